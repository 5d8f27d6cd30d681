"""The command line: compose, check, freeze, launch, return the objective."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from app import report
from app.config import resolvers
from app.config.compose import CONF, CONFIG_NAME
from app.config.schema import Job
from app.config.secrets import unsaid
from app.distributed.launch.environment import World, joined, requeue
from app.distributed.launch.failures import Failure, RankFailed
from app.distributed.launch.local import launch_local, warm_up
from app.distributed.launch.select import launch_inline, ranks_wanted
from app.distributed.launch.torchrun import Leader, follow
from app.distributed.launch.worker import errors_to_stderr
from app.experiment.job import prepared
from app.preflight import check_what_is_shown, is_a_run, preflight
from app.runtime.errors import ConfigError, NonFiniteError, StorageError, UserError, looking
from app.runtime.files import remove_partial
from app.runtime.lock import owned
from app.runtime.signals import FAILURE, INTERRUPTED, MISTAKE, Reason, Stopped
from app.sweep.check import POOL, trust_mistakes
from app.sweep.folder import SweepFolder
from app.sweep.launchers.external import Process, run_elsewhere, this_process
from app.sweep.outcome import DIVERGED, outcome_of, record_failure

log = logging.getLogger(__name__)
log.setLevel(logging.DEBUG)  # where errors came from is for run.log alone


def main() -> None:
    """The console script `app`, and `python -m app`."""
    if sys.argv[1:2] == [report.COMMAND]:
        sys.exit(report.main(sys.argv[2:]))
    resolvers.register()
    parser = get_args_parser()
    parser.prog = "app"
    args = parser.parse_args()
    runs, world = is_a_run(args), None
    try:
        args = with_saved_words(args)
        world = joined(args.overrides, os.environ)
    except UserError as error:
        _leave(str(error), MISTAKE)
    if world is None:
        sys.exit(lead(args, None))
    if world.rank > 0:
        _end(obey(world) if runs else 0)
    leader, code = Leader(world), FAILURE
    try:
        code = lead(args, leader)
    finally:
        if runs:
            leader.leave(code)
    _end(code)


@looking("sweep.resume")
def with_saved_words(args: argparse.Namespace) -> argparse.Namespace:
    """Where nothing but `sweep.resume` is typed, the sweep's own words are meant.

    Raises:
        UserError: The folder is damaged, or words of its have to be typed.
    """
    typed = dict(word.partition("=")[::2] for word in args.overrides)
    own = ("sweep.", "hydra", "trusted_targets")
    if typed.get("sweep.resume") and all(key.startswith(own) for key in typed):
        folder = SweepFolder(Path(typed["sweep.resume"].strip("'\"")).expanduser())
        saved, mistakes = folder.words, list(trust_mistakes(folder, args.overrides))
        if mistakes:
            raise ConfigError(mistakes)
        other = ("hydra.launcher.",) if "hydra/launcher" in typed else ()  # keys of the one before
        keys = {word: word.partition("=")[0] for word in saved}
        added = [w for w, key in keys.items() if key not in typed and not key.startswith(other)]
        sys.argv += added  # from there Hydra reads them
        args.overrides += added
    return args


def lead(args: argparse.Namespace, leader: Leader | None) -> int:
    """All jobs, from the process that talks to Hydra; gives the exit code."""
    try:
        if not is_a_run(args):
            check_what_is_shown(args)
        elif preflight(args, leader) == POOL:
            warm_up()
        run_jobs(leader)
        return 0
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code if isinstance(error, StorageError) else MISTAKE
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)


def obey(world: World) -> int:
    """What rank 0 tells; gives the exit code."""
    try:
        return follow(world)
    except Stopped as stopped:
        return stopped.code
    except Exception as error:  # noqa: BLE001 - rank 0 has said it, where it still can
        sys.stderr.write(f"rank {world.rank} ends: {type(error).__name__}: {error}\n")
        return FAILURE


def _leave(message: str, code: int) -> NoReturn:
    sys.stderr.write(f"{message}\n")
    sys.exit(code)


def _end(code: int) -> NoReturn:
    """At once: what a failed rank has left of its connections may hold it up for long."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_jobs(leader: Leader | None) -> None:
    """All jobs, by Hydra."""
    task = partial(run_job, leader=leader, driver=this_process())
    hydra.main(version_base="1.3", config_path=str(CONF), config_name=CONFIG_NAME)(task)()


def run_job(
    composed: DictConfig, leader: Leader | None = None, driver: Process | None = None
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
    if multirun and sweep.is_marked:
        return None
    errors_to_stderr()
    logging.captureWarnings(True)
    try:
        if driver in (None, this_process()):
            value = start(with_hydra, folder, leader)
            if not multirun and outcome_of(folder).status == DIVERGED:
                sys.exit(NonFiniteError.exit_code)
            return value
        return run_elsewhere(partial(start, with_hydra, folder, leader, quiet=True), sweep, folder)
    except JobFailed as failed:
        failure = Failure.of(0, failed.__cause__ or failed)
        record_failure(folder, failure, says=False)
        if not multirun or leader is not None:
            sys.exit(failure.code)
        if composed.sweep.on_error == "stop":
            sweep.mark(stopped=True)
        return None
    finally:
        if multirun:
            from app.sweep.report.write import refresh

            refresh(sweep.path)


class JobFailed(Exception):  # noqa: N818
    """A job has ended as it should not, and its log says why."""


def start(
    composed: DictConfig, folder: Path, leader: Leader | None, quiet: bool = False
) -> float | None:
    """One job; a quiet one writes to `logs/` what it would show on the terminal.

    Raises:
        JobFailed: It has.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(owned(folder))
        except UserError as error:  # what stands in the folder may be another's
            sys.stderr.write(f"{error}\n")
            sys.exit(error.exit_code)
        return started(composed, folder, leader, quiet)


def started(composed: DictConfig, folder: Path, leader: Leader | None, quiet: bool) -> float | None:
    """One job, in a folder that is its own.

    Raises:
        JobFailed: It has.
    """
    try:
        remove_partial(folder)
        job = prepared(composed, folder)
    except UserError as error:
        log.error("%s", error)
        raise JobFailed from error
    try:
        return launch(job, folder, leader, composed.hydra, quiet)
    except UserError as error:
        log.error("%s", unsaid(str(error)))
        log.debug("it came from\n%s", unsaid("".join(traceback.format_exception(error))))
        raise JobFailed from error
    except RankFailed as error:
        log.error("the run failed: %s\n%s", error, error.failure.trace)
        raise JobFailed from error
    except Stopped as stopped:
        log.warning("%s", stopped)
        if stopped.reason is Reason.PREEMPTED and job.config.trainer.requeue:
            requeue()
        sys.exit(stopped.code)
    except KeyboardInterrupt:
        log.warning("interrupted")
        sys.exit(INTERRUPTED)
    except Exception as error:
        trace = "".join(traceback.format_exception(error)).rstrip()
        log.error(unsaid(f"the run failed: {type(error).__name__}: {error}\n{trace}"))
        raise JobFailed from error


def launch(
    job: Job, folder: Path, leader: Leader | None, hydra_node: DictConfig, quiet: bool
) -> float | None:
    """Runs a job on its devices; gives the goal's best value."""
    if leader is not None:
        return leader.launch(job, folder)
    size = ranks_wanted(job.config, hydra_node.mode == RunMode.MULTIRUN)
    if size == 0:
        return launch_inline(job, folder)
    logging_config: Any = OmegaConf.to_container(hydra_node.job_logging, resolve=True)
    return launch_local(job, folder, size, logging_config, quiet)
