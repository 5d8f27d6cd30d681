"""Everything is looked at before the first job starts and before any file is written."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from omegaconf import DictConfig

from app.config.compose import composer
from app.config.schema import Job
from app.distributed.launch.select import check_environment, choose_num_ranks
from app.distributed.launch.torchrun import RankZero
from app.experiment.job import has_longer_schedule, hydra_value, make_jobs, resolve_folder
from app.runtime.errors import ConfigError, ConfigIssue, NonFiniteError, as_user_error
from app.runtime.files import check_disk_space, check_writable, read_status
from app.runtime.lock import check_unlocked
from app.sweep.check import check_is_sweep, check_sweep
from app.sweep.folder import SweepFolder
from app.sweep.outcome import COMPLETED, DIVERGED, OVER

NAME = 255  # bytes of a file's name, which no system in use lets be longer
OPENED = ("run.log", "sweep.log", "multirun.yaml")  # by others, who tell no user why not
RECORD = ("config.yaml", "hydra.yaml", "overrides.yaml")  # Hydra's own of a job


def is_a_run(args: argparse.Namespace) -> bool:
    """Whether jobs are to run; not so for help, completion and printed configurations."""
    shows = args.help or args.hydra_help or args.cfg or args.info or args.shell_completion
    return not shows and args.experimental_rerun is None


@as_user_error()
def preflight(args: argparse.Namespace, leader: RankZero | None = None) -> str:
    """Looks for mistakes in every job before the first starts and before any file is written.

    Returns:
        The launcher.

    Raises:
        UserError: All that was found.
    """
    with composer(args) as composing:
        check_is_sweep(composing)
        jobs = make_jobs(composing)
        key = "hydra.sweep.dir" if composing.sweeps else "hydra.run.dir"
        folders = [resolve_folder(composed, key) for composed, _ in jobs]
        records = [hydra_value(composed, "hydra.output_subdir") or "" for composed, _ in jobs]
        if composing.sweeps:
            check_sweep(composing, jobs[0][0], leader is None)
        if jobs[0][1].config.mode == "check":
            sys.stdout.write("no mistake in the configuration\n")
            sys.exit(0)
    for folder, record, (composed, job) in zip(folders, records, jobs, strict=True):
        with as_user_error(key):
            _check_folder(key, folder, composed, job)
            _check_record(key, folder / str(record))
        if leader is None:
            choose_num_ranks(job.config, composing.sweeps)
        else:
            check_environment(job.config, leader.world)
    return str(jobs[0][0].hydra.launcher._target_)


def _check_folder(key: str, folder: Path, composed: DictConfig, job: Job) -> None:
    """The run folder can be made, and is not that of another run."""
    status = folder / "status.json"
    resumes = job.config.resume not in (None, "auto") or job.config.sweep.resume is not None
    check_unlocked(folder)
    over = resumes and str(read_status(folder).get("status"))
    if (over == COMPLETED and not has_longer_schedule(job)) or (
        over in OVER and not job.differences
    ):
        _leave_it(folder, over)
    if status.exists() and not resumes and composed.resume != "auto":
        raise ConfigError(
            [ConfigIssue(key, f"={str(folder)!r} holds a run; it is not overwritten")]
        )
    if SweepFolder(folder).exists and not resumes:
        problem = f"={str(folder)!r} holds a sweep; sweep.resume={folder} goes on with it"
        raise ConfigError([ConfigIssue(key, problem)])
    nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not nearest.is_dir() or not _is_writable(nearest):
        reason = f"{str(nearest)!r} is no folder that can be written to"
        raise ConfigError([ConfigIssue(key, f"={str(folder)!r} cannot be made: {reason}")])
    if any(len(os.fsencode(name)) > NAME for name in folder.relative_to(nearest).parts):
        problem = f"={str(folder)!r} cannot be made: a name of more than {NAME} bytes"
        raise ConfigError([ConfigIssue(key, problem)])
    if status.is_dir():
        raise ConfigError(
            [ConfigIssue(key, f": {status} is a folder, and would be a file of the run")]
        )
    check_writable(folder, OPENED)
    check_disk_space(nearest)


def _check_record(key: str, folder: Path) -> None:
    """Hydra can write its own record of a job there."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(
            [ConfigIssue(key, f": {folder} is a file, and would be a folder of the run")]
        )
    check_writable(folder, RECORD)


def _leave_it(folder: Path, status: str) -> NoReturn:
    """A run that is over does not go on, and ends as it has ended."""
    if status == DIVERGED:
        sys.stdout.write(
            f"the run in {folder} has diverged: it goes on only with something changed, as "
            "optimizer.lr, trainer.on_nonfinite=skip\n"
        )
        sys.exit(NonFiniteError.exit_code)
    sys.stdout.write(f"the run in {folder} is complete: there is nothing to go on with\n")
    sys.exit(0)


def _is_writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)


@as_user_error()
def check_what_is_shown(args: argparse.Namespace) -> None:
    """Hydra resolves what it prints, and a saved job that it is to run again is a pickle."""
    if args.experimental_rerun is not None:
        problem = f"={args.experimental_rerun!r} would run the code in a pickle; use resume=FOLDER"
        raise ConfigError([ConfigIssue("--experimental-rerun", problem)])
    if args.help or args.cfg or args.info:
        with composer(args) as composing:
            list(composing.compositions())
