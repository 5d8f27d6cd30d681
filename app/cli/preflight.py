"""Checks of every job that run before the first one starts and before any file is written."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from omegaconf import DictConfig

from app.config.compose import Composer
from app.config.schema import AUTO, Job
from app.distributed.launch.select import check_environment, choose_num_ranks
from app.distributed.launch.torchrun import RankZero
from app.experiment.job import has_longer_schedule, hydra_value, make_jobs, resolve_folder
from app.runtime.errors import ConfigError, ConfigIssue, NonFiniteError, as_user_error
from app.runtime.files import check_disk_space, check_writable, read_status
from app.runtime.lock import check_unlocked, refuse_special_files
from app.sweep.check import check_resume_is_multirun, check_sweep, check_trial_is_unset
from app.sweep.folder import SweepFolder
from app.sweep.outcome import COMPLETED, DIVERGED, FINISHED_STATUSES

MAX_NAME_BYTES = 255  # the limit for one file name on all common file systems
# Files that other libraries open, whose errors would not tell the user what to do.
LOG_FILES = ("run.log", "sweep.log", "multirun.yaml")
SWEEP_KEYS = ("hydra/sweeper", "hydra.sweeper", "hydra/launcher", "hydra.launcher", "sweep.")
HYDRA_FILES = ("config.yaml", "hydra.yaml", "overrides.yaml")


@as_user_error()
def preflight(composer: Composer, rank_zero: RankZero | None = None) -> str:
    """Check every job before the first one starts and before any file is written.

    Returns:
        The target of the launcher.

    Raises:
        UserError: All errors that were found.
    """
    check_resume_is_multirun(composer)
    with _garbage_collection_paused():
        jobs = make_jobs(composer)
    for _, job in jobs:
        check_trial_is_unset(job)
    key = "hydra.sweep.dir" if composer.is_sweep else "hydra.run.dir"
    folders = [resolve_folder(composed, key) for composed, _ in jobs]
    subfolders = [hydra_value(composed, "hydra.output_subdir") or "" for composed, _ in jobs]
    if composer.is_sweep:
        check_sweep(composer, jobs[0][0], rank_zero is None)
    if jobs[0][1].config.mode == "check":
        _check_samples([job for _, job in jobs])
        sys.exit(0)
    for folder, subfolder, (composed, job) in zip(folders, subfolders, jobs, strict=True):
        with as_user_error(key):
            _check_folder(key, folder, composed, job)
            _check_hydra_folder(key, folder / str(subfolder))
            if composer.is_sweep:
                _check_job_folders(folder)
        if rank_zero is None:
            _warn_of_ranks(job, choose_num_ranks(job.config, composer.is_sweep))
        else:
            check_environment(job.config, rank_zero.cluster)
    if not composer.is_sweep:
        _warn_of_unused_sweep(composer.overrides)
    return str(jobs[0][0].hydra.launcher._target_)


def _check_samples(jobs: list[Job]) -> None:
    """Say that the configurations are valid, after two samples went through each of the models."""
    for warning in dict.fromkeys(line for job in jobs for line in job.data_warnings):
        sys.stderr.write(f"{warning}\n")
    config_only = [job.config.check == "config" for job in jobs]
    if not all(config_only):
        from app.experiment.run import check_samples

        for job in jobs:
            check_samples(job)
    rest = "; no sample was sent through the model" if all(config_only) else ""
    sys.stdout.write(f"the configuration is valid{rest}\n")


def _warn_of_ranks(job: Job, num_ranks: int) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if cores and num_ranks > cores:
        sys.stderr.write(
            f"warning: trainer.devices={job.config.trainer.devices!r} starts {num_ranks} processes "
            f"on {cores} CPU cores, which slows all of them down\n"
        )


def _warn_of_unused_sweep(overrides: list[str]) -> None:
    unused = [text for text in overrides if text.lstrip("+").startswith(SWEEP_KEYS)]
    if unused:
        sys.stderr.write(
            f"warning: {' '.join(unused)} has no effect without -m, which starts a sweep\n"
        )


@contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """Pause garbage collection while libraries are imported.

    It would search the many objects that imports create again and again, and find nothing.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # later collections leave these objects out, too
        gc.enable()


def _check_folder(key: str, folder: Path, composed: DictConfig, job: Job) -> None:
    """Check that the run folder can be created and does not belong to another run."""
    status = folder / "status.json"
    resumes_run = composed.resume not in (None, AUTO) or job.config.resume not in (None, AUTO)
    resumes = resumes_run or job.config.sweep.resume is not None
    check_unlocked(folder)
    saved_status = resumes and str(read_status(folder).get("status"))
    if (saved_status == COMPLETED and not has_longer_schedule(job)) or (
        saved_status in FINISHED_STATUSES and not job.differences
    ):
        _exit_already_finished(folder, saved_status)
    if status.exists() and not resumes and composed.resume != AUTO:
        problem = (
            f"={str(folder)!r} already contains a run, which is not overwritten; "
            "use another folder, or resume=FOLDER to resume the run"
        )
        raise ConfigError([ConfigIssue(key, problem)])
    if SweepFolder(folder).exists and not resumes:
        problem = f"={str(folder)!r} already contains a sweep; resume it with sweep.resume={folder}"
        raise ConfigError([ConfigIssue(key, problem)])
    nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not nearest.is_dir() or not _is_writable(nearest):
        reason = f"{str(nearest)!r} is not a writable folder"
        raise ConfigError([ConfigIssue(key, f"={str(folder)!r} cannot be created: {reason}")])
    if any(len(os.fsencode(name)) > MAX_NAME_BYTES for name in folder.relative_to(nearest).parts):
        reason = f"a name is longer than {MAX_NAME_BYTES} bytes"
        raise ConfigError([ConfigIssue(key, f"={str(folder)!r} cannot be created: {reason}")])
    if status.is_dir():
        problem = f": {status} is a folder, but the run writes a file of that name"
        raise ConfigError([ConfigIssue(key, problem)])
    check_writable(folder, LOG_FILES)
    check_disk_space(folder)


def _check_job_folders(folder: Path) -> None:
    """Check for links in the job folders of a sweep: Hydra opens logs there before our lock."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir():
            refuse_special_files(path)


def _check_hydra_folder(key: str, folder: Path) -> None:
    """Check that Hydra can write its own files of a job."""
    if folder.exists() and not folder.is_dir():
        problem = f": {folder} is a file, but the run needs a folder of that name"
        raise ConfigError([ConfigIssue(key, problem)])
    check_writable(folder, HYDRA_FILES)


def _exit_already_finished(folder: Path, status: str) -> NoReturn:
    """Exit with the code that the finished run ended with."""
    if status == DIVERGED:
        sys.stdout.write(
            f"the run in {folder} has diverged; to resume it, change something, for example "
            "optimizer.lr=..., or trainer.on_nonfinite=skip\n"
        )
        sys.exit(NonFiniteError.exit_code)
    sys.stdout.write(f"the run in {folder} is already complete: nothing to resume\n")
    sys.exit(0)


def _is_writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)
