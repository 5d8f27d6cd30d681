"""Run the jobs of a sweep: what all launchers have in common, and those with Hydra's interface."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from hydra.core.config_loader import ConfigLoader
from hydra.core.utils import JobReturn
from omegaconf import DictConfig, open_dict, read_write

from app.distributed.launch.failures import (
    NO_REPORT,
    RankFailure,
    format_error,
    record_rank_failure,
)
from app.runtime.signals import StopSignal, TrainingInterrupted
from app.sweep.folder import SweepFolder
from app.sweep.launchers.external import polling
from app.sweep.outcome import PENDING, RUNNING, read_run_status, record_failure

log = logging.getLogger(__name__)
STATUS_POLL_SECONDS = 2.0  # how often the status files of external jobs are read


@dataclass(frozen=True)
class ComposedJob:
    """A job that is ready to run.

    Attributes:
        number: Number of the job.
        overrides: All its overrides.
        config: Its configuration, with the `hydra` node.
        folder: Its run folder.
    """

    number: int
    overrides: list[str]
    config: DictConfig
    folder: Path


def compose_job(
    loader: ConfigLoader, sweep_config: DictConfig, number: int, overrides: Sequence[str]
) -> ComposedJob:
    """Compose the configuration of a job.

    Raises:
        HydraException | OmegaConfBaseException | UserError: The overrides do not fit together.
    """
    config = loader.load_sweep_config(sweep_config, list(overrides))
    with read_write(config), open_dict(config):
        config.hydra.job.id, config.hydra.job.num = str(number), number
    folder = Path(config.hydra.sweep.dir) / str(config.hydra.sweep.subdir)
    return ComposedJob(number, list(overrides), config, folder.absolute())


NextJob = Callable[[], ComposedJob | None]
OnJobEnd = Callable[[int], None]


@runtime_checkable
class JobRunner(Protocol):
    """Runs the jobs of a sweep."""

    def run_jobs(self, next_job: NextJob, on_job_end: OnJobEnd) -> None:
        """Run jobs until there are none left.

        Args:
            next_job: Returns the next job; None if there is none now.
            on_job_end: Called with the number of each job that has ended, whatever its status.

        Raises:
            TrainingInterrupted: A signal has asked to stop, and all jobs have stopped.
            KeyboardInterrupt: Ctrl-C was pressed twice.
        """


class BatchRunner:
    """Runs jobs with a launcher of Hydra or of another package, one batch after the other.

    Args:
        launcher: Hydra's launcher, which returns when all jobs of a batch have ended.
        batch_size: Number of jobs per batch.
        is_external: Whether jobs run in other processes, maybe on other machines.
        folder: Folder of the sweep.
        log_status: Logs how a job has ended, unless that has been logged before.
    """

    def __init__(
        self,
        launcher: Any,
        batch_size: int,
        is_external: bool,
        folder: SweepFolder,
        log_status: Callable[[int], object],
    ) -> None:
        self.launcher, self.batch_size, self.is_external = launcher, batch_size, is_external
        self.folder, self.log_status = folder, log_status
        self.stop = StopSignal(forward=lambda _: folder.stop(running_jobs=True))

    def run_jobs(self, next_job: NextJob, on_job_end: OnJobEnd) -> None:
        """Run jobs until there are none left; see `JobRunner`."""
        while jobs := list(islice(iter(next_job, None), self.batch_size)):
            results = self._run_external(jobs) if self.is_external else self._launch(jobs)
            for job, result in zip_longest(jobs, results):
                self._record_missing_status(job, result)
            for job in jobs:
                on_job_end(job.number)
            if self.stop.requested:
                raise TrainingInterrupted(self.stop.requested)

    def _launch(self, jobs: Sequence[ComposedJob]) -> Sequence[JobReturn]:
        overrides = [job.overrides for job in jobs]
        results: Sequence[JobReturn] = self.launcher.launch(overrides, jobs[0].number)
        return results

    def _run_external(self, jobs: Sequence[ComposedJob]) -> Sequence[JobReturn]:
        """Run jobs in other processes; if the launcher itself fails, stop them all."""
        before = {job.number: read_run_status(job.folder) for job in jobs}

        def log_ends() -> bool:
            for job in jobs:
                outcome = read_run_status(job.folder)
                if outcome.status not in (PENDING, RUNNING) and outcome != before[job.number]:
                    self.log_status(job.number)
            return True

        with self.stop.installed(), polling(log_ends, STATUS_POLL_SECONDS):
            try:
                return self._launch(jobs)
            except KeyboardInterrupt:
                for job in jobs:
                    self._record_missing_status(job, None)
                raise
            except (Exception, SystemExit) as error:  # each launcher library has its own
                log.error("the launcher failed: %s", format_error(error).splitlines()[0])
                log.debug("traceback of the launcher", exc_info=error)
                self.folder.stop(running_jobs=True)
                while any(self.folder.is_running(job.folder) for job in jobs):
                    time.sleep(0.2)
                return []

    def _record_missing_status(self, job: ComposedJob, result: JobReturn | None) -> None:
        """Write the final status of a job whose process could not write it itself."""
        if _has_returned(result) and not job.folder.exists():
            return  # it was deleted while the job ran
        status = read_run_status(job.folder).status
        if status not in (PENDING, RUNNING) or self.folder.is_running(job.folder):
            return
        if status == RUNNING and self.stop.requested:
            record_rank_failure(job.folder, RankFailure(0, "interrupted", "KeyboardInterrupt"))
        elif status == RUNNING or not self.folder.is_stopped:
            job.folder.mkdir(parents=True, exist_ok=True)
            record_failure(job.folder, _to_failure(result))


def _has_returned(result: JobReturn | None) -> bool:
    return result is not None and not isinstance(result._return_value, BaseException)


def _to_failure(result: JobReturn | None) -> RankFailure:
    error = None if result is None else result._return_value
    if isinstance(error, BaseException):
        return RankFailure.from_exception(0, error)
    return RankFailure(0, "died", NO_REPORT)
