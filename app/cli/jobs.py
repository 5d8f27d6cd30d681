"""Run one job of the command line or of a sweep, and record how it ended."""

from __future__ import annotations

import logging
import shlex
import sys
import traceback
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from app.config import resolvers
from app.config.schema import Job
from app.config.secrets import redact_text
from app.distributed.launch.environment import requeue
from app.distributed.launch.failures import RankFailedError, RankFailure
from app.distributed.launch.local import launch_local
from app.distributed.launch.select import choose_num_ranks, launch_inline
from app.distributed.launch.torchrun import RankZero
from app.distributed.launch.worker import route_errors_to_stderr
from app.experiment.entry import run_experiment
from app.experiment.job import START_CONFIG, prepare
from app.runtime.errors import NonFiniteError, UserError
from app.runtime.escaping import escape_log_records, print_error
from app.runtime.files import remove_temp_files
from app.runtime.lock import run_lock
from app.runtime.signals import EXIT_INTERRUPTED, StopReason, TrainingInterrupted
from app.sweep.folder import SweepFolder
from app.sweep.launchers.external import ProcessId, current_process_id, run_external
from app.sweep.outcome import DIVERGED, read_run_status, record_failure
from app.training.checkpoint.rotation import CHECKPOINT_DIR

log = logging.getLogger(__name__)
log.setLevel(logging.DEBUG)  # tracebacks of user errors go to run.log only


class JobFailedError(Exception):
    """A job failed; the reason has already been logged.

    Args:
        error: Why it failed.
    """

    def __init__(self, error: BaseException) -> None:
        self.failure = RankFailure.from_exception(0, error)
        super().__init__(self.failure.error)


def run_job(
    composed: DictConfig, rank_zero: RankZero | None = None, main_process: ProcessId | None = None
) -> float | None:
    """Run one job in the process that Hydra chose for it; failures are recorded in its folder.

    Args:
        composed: The configuration composed by Hydra.
        rank_zero: The connection to the other ranks, if torchrun or srun started this process.
        main_process: The process that the user started.

    Returns:
        The best value of the goal; None if the job measured none, failed or was skipped.
    """
    # A launcher may run this in a process where nothing has registered the resolvers yet.
    resolvers.register()
    hydra_node = HydraConfig.get()
    folder, multirun = Path(hydra_node.runtime.output_dir), hydra_node.mode == RunMode.MULTIRUN
    sweep = SweepFolder(Path(str(hydra_node.sweep.dir)).absolute())
    with_hydra = OmegaConf.merge({"hydra": hydra_node}, composed)
    assert isinstance(with_hydra, DictConfig)
    if multirun and sweep.is_stopped:
        return None
    escape_log_records()
    route_errors_to_stderr()
    logging.captureWarnings(True)
    try:
        if main_process in (None, current_process_id()):
            value = run_locked(with_hydra, folder, rank_zero)
            if not multirun and read_run_status(folder).status == DIVERGED:
                sys.exit(NonFiniteError.exit_code)
            return value
        return run_external(
            partial(run_locked, with_hydra, folder, rank_zero, quiet=True), sweep, folder
        )
    except JobFailedError as error:
        if not multirun or rank_zero is not None:
            sys.exit(error.failure.exit_code)
        if composed.sweep.on_error == "stop":
            sweep.stop()
        return None
    finally:
        if multirun and sweep.path.exists():
            from app.sweep.report.write import update_tables

            update_tables(sweep.path)


def run_locked(
    composed: DictConfig, folder: Path, rank_zero: RankZero | None, quiet: bool = False
) -> float | None:
    """Run one job while holding the lock of its folder.

    Args:
        composed: The configuration composed by Hydra, with the `hydra` node.
        folder: The run folder.
        rank_zero: The connection to the other ranks, if torchrun or srun started this process.
        quiet: Write terminal output to files in `logs/` instead.

    Raises:
        JobFailedError: The job failed.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(run_lock(folder))
        except UserError as error:  # not logged: run.log may belong to the process with the lock
            print_error(redact_text(str(error)))
            sys.exit(error.exit_code)
        try:
            return run_job_in_folder(composed, folder, rank_zero, quiet)
        except JobFailedError as error:
            record_failure(folder, error.failure, write_log=False)
            raise


def run_job_in_folder(
    composed: DictConfig, folder: Path, rank_zero: RankZero | None, quiet: bool
) -> float | None:
    """Run one job in a folder that this process has locked.

    Raises:
        JobFailedError: The job failed.
    """
    try:
        remove_temp_files(folder)
        job = prepare(composed, folder)
    except UserError as error:
        log.error("%s", error)
        raise JobFailedError(error) from error
    try:
        return launch(job, folder, rank_zero, composed.hydra, quiet)
    except UserError as error:
        log.error("%s", redact_text(str(error)))
        trace = "".join(traceback.format_exception(error))
        log.debug("traceback of this error:\n%s", redact_text(trace))
        raise JobFailedError(error) from error
    except RankFailedError as error:
        log.error("the run failed: %s\n%s", error, error.failure.trace)
        raise JobFailedError(error) from error
    except TrainingInterrupted as interrupt:
        log.warning("%s%s", interrupt, resume_hint(composed, folder))
        if interrupt.reason is StopReason.PREEMPTED and job.config.trainer.requeue:
            requeue()
        sys.exit(interrupt.exit_code)
    except KeyboardInterrupt:
        log.warning("interrupted%s", resume_hint(composed, folder))
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        trace = "".join(traceback.format_exception(error)).rstrip()
        log.error(redact_text(f"the run failed: {type(error).__name__}: {error}\n{trace}"))
        raise JobFailedError(error) from error


def resume_hint(composed: DictConfig, folder: Path) -> str:
    """Return the command that resumes a single run; empty if that is not possible."""
    multirun = composed.hydra.mode == RunMode.MULTIRUN
    if multirun or not (folder / CHECKPOINT_DIR / START_CONFIG).is_file():
        return ""
    return f"; to resume: python -m app resume={shlex.quote(str(folder))}"


def launch(
    job: Job, folder: Path, rank_zero: RankZero | None, hydra_node: DictConfig, quiet: bool
) -> float | None:
    """Run a job on its devices and return the best value of its goal."""
    if rank_zero is not None:
        return rank_zero.launch(run_experiment, job, folder)
    num_ranks = choose_num_ranks(job.config, hydra_node.mode == RunMode.MULTIRUN)
    if num_ranks == 0:
        return launch_inline(run_experiment, job, folder)
    logging_config: Any = OmegaConf.to_container(hydra_node.job_logging, resolve=True)
    return launch_local(run_experiment, job, folder, num_ranks, logging_config, quiet)
