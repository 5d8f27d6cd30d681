"""One job: run it, and record how it ended."""

from __future__ import annotations

import logging
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
from app.distributed.launch.worker import errors_to_stderr
from app.experiment.entry import run_experiment
from app.experiment.job import prepare
from app.runtime.errors import NonFiniteError, UserError
from app.runtime.files import remove_temp_files
from app.runtime.lock import run_lock
from app.runtime.signals import EXIT_INTERRUPTED, StopReason, TrainingInterrupted
from app.sweep.folder import SweepFolder
from app.sweep.launchers.external import Process, run_external, this_process
from app.sweep.outcome import DIVERGED, read_run_status, record_failure

log = logging.getLogger(__name__)


def run_job(
    composed: DictConfig, leader: RankZero | None = None, driver: Process | None = None
) -> float | None:
    """One job, in the process that Hydra has chosen for it; what went wrong is in its folder.

    Args:
        composed: By Hydra.
        leader: Where torchrun or srun has started this.
        driver: The process that was typed.
    """
    resolvers.register()  # in a process of another launcher nobody else has
    hydra_node = HydraConfig.get()
    folder, multirun = Path(hydra_node.runtime.output_dir), hydra_node.mode == RunMode.MULTIRUN
    sweep = SweepFolder(Path(str(hydra_node.sweep.dir)).absolute())
    with_hydra = OmegaConf.merge({"hydra": hydra_node}, composed)
    assert isinstance(with_hydra, DictConfig)
    if multirun and sweep.is_stopped:
        return None
    errors_to_stderr()
    logging.captureWarnings(True)
    try:
        if driver in (None, this_process()):
            value = run_locked(with_hydra, folder, leader)
            if not multirun and read_run_status(folder).status == DIVERGED:
                sys.exit(NonFiniteError.exit_code)
            return value
        return run_external(
            partial(run_locked, with_hydra, folder, leader, quiet=True), sweep, folder
        )
    except JobFailedError as failed:
        failure = RankFailure.from_exception(0, failed.__cause__ or failed)
        record_failure(folder, failure, says=False)
        if not multirun or leader is not None:
            sys.exit(failure.code)
        if composed.sweep.on_error == "stop":
            sweep.set_stopped(stopped=True)
        return None
    finally:
        if multirun:
            from app.sweep.report.write import update_tables

            update_tables(sweep.path)


class JobFailedError(Exception):
    """A job has ended as it should not, and its log says why."""


def run_locked(
    composed: DictConfig, folder: Path, leader: RankZero | None, quiet: bool = False
) -> float | None:
    """One job; a quiet one writes to `logs/` what it would show on the terminal.

    Raises:
        JobFailed: It has.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(run_lock(folder))
        except UserError as error:  # what stands in the folder may be another's
            sys.stderr.write(f"{error}\n")
            sys.exit(error.exit_code)
        return run_job_in_folder(composed, folder, leader, quiet)


def run_job_in_folder(
    composed: DictConfig, folder: Path, leader: RankZero | None, quiet: bool
) -> float | None:
    """One job, in a folder that is its own.

    Raises:
        JobFailed: It has.
    """
    try:
        remove_temp_files(folder)
        job = prepare(composed, folder)
    except UserError as error:
        log.error("%s", error)
        raise JobFailedError from error
    try:
        return launch(job, folder, leader, composed.hydra, quiet)
    except UserError as error:
        log.error("%s", redact_text(str(error)))
        log.debug("it came from\n%s", redact_text("".join(traceback.format_exception(error))))
        raise JobFailedError from error
    except RankFailedError as error:
        log.error("the run failed: %s\n%s", error, error.failure.trace)
        raise JobFailedError from error
    except TrainingInterrupted as stopped:
        log.warning("%s", stopped)
        if stopped.reason is StopReason.PREEMPTED and job.config.trainer.requeue:
            requeue()
        sys.exit(stopped.code)
    except KeyboardInterrupt:
        log.warning("interrupted")
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        trace = "".join(traceback.format_exception(error)).rstrip()
        log.error(redact_text(f"the run failed: {type(error).__name__}: {error}\n{trace}"))
        raise JobFailedError from error


def launch(
    job: Job, folder: Path, leader: RankZero | None, hydra_node: DictConfig, quiet: bool
) -> float | None:
    """Runs a job on its devices; gives the goal's best value."""
    if leader is not None:
        return leader.launch(run_experiment, job, folder)
    size = choose_num_ranks(job.config, hydra_node.mode == RunMode.MULTIRUN)
    if size == 0:
        return launch_inline(run_experiment, job, folder)
    logging_config: Any = OmegaConf.to_container(hydra_node.job_logging, resolve=True)
    return launch_local(run_experiment, job, folder, size, logging_config, quiet)
