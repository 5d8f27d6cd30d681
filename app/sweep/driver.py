"""Run the jobs of a sweep with any launcher, and keep its tables up to date."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from app.config.overrides import SweepSpace, quote
from app.distributed.launch.failures import RankFailure
from app.runtime.errors import UserError
from app.sweep.folder import SweepFolder
from app.sweep.job import SweepJob
from app.sweep.launchers import BASIC_LAUNCHER
from app.sweep.launchers.runner import BatchRunner, ComposedJob, JobRunner, compose_job
from app.sweep.outcome import FAILED, RunStatus, read_run_status, record_failure
from app.sweep.report.write import update_tables

log = logging.getLogger(__name__)


class JobSource(ABC):
    """A sequence of jobs that may depend on the results of earlier ones.

    Args:
        folder: Folder of the sweep.
        space: Swept keys and their values.
        max_retries: How often a failed job is retried.
    """

    def __init__(self, folder: SweepFolder, space: SweepSpace, max_retries: int) -> None:
        self.folder, self.space, self.max_retries = folder, space, max_retries

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """Number of jobs per call of a launcher that runs batches."""

    @abstractmethod
    def next_job(self) -> SweepJob | None:
        """Return the next job; None if there is none now."""

    def extra_overrides(self, job: SweepJob) -> list[str]:  # noqa: ARG002
        """Return overrides for a job in addition to its own."""
        return []

    def on_job_end(self, job: SweepJob, outcome: RunStatus) -> None:  # noqa: B027
        """Handle the end of a job, whatever its status."""

    def may_retry(self, job: SweepJob) -> bool:
        """Return whether to run a failed job again; log a warning if not."""
        if job.failures > self.max_retries:
            message = "job %d has failed %d times and is not retried (sweep.max_retries=%d)"
            log.warning(message, job.number, job.failures, self.max_retries)
        return job.failures <= self.max_retries


class SweepDriver:
    """Runs the remaining jobs of a sweep.

    Args:
        folder: Folder of the sweep.
        source: Where jobs come from.
        config: Configuration of the sweep as composed by Hydra.
        loader: Composes the configurations of the jobs.
    """

    def __init__(
        self, folder: SweepFolder, source: JobSource, config: DictConfig, loader: ConfigLoader
    ) -> None:
        self.folder, self.source, self.config, self.loader = folder, source, config, loader
        self.jobs: dict[int, SweepJob] = {}  # that were taken from the source, by number
        self.logged_statuses: dict[int, str] = {}  # by job number

    def run(self, launcher: Any) -> None:
        """Run all jobs with a `JobRunner` or another launcher of Hydra.

        Raises:
            TrainingInterrupted: A signal has asked to stop, and all jobs have stopped.
        """
        self.folder.clear_stop()
        self._make_runner(launcher).run_jobs(self._next_job, self._on_job_end)

    def _make_runner(self, launcher: Any) -> JobRunner:
        if isinstance(launcher, JobRunner):
            return launcher
        is_external = self.config.hydra.launcher._target_ != BASIC_LAUNCHER
        batch_size = self.source.batch_size if is_external else 1
        return BatchRunner(launcher, batch_size, is_external, self.folder, self._log_status)

    def _next_job(self) -> ComposedJob | None:
        """Return the next job; one that cannot be composed fails alone."""
        while not self.folder.is_stopped and (job := self.source.next_job()) is not None:
            self.jobs[job.number] = job
            try:
                return compose_job(self.loader, self.config, job.number, self._overrides(job))
            except (HydraException, OmegaConfBaseException, UserError) as error:
                folder = self.folder.run_folder(job)
                folder.mkdir(parents=True, exist_ok=True)
                record_failure(folder, RankFailure.from_exception(0, error))
                self._on_job_end(job.number)
        return None

    def _overrides(self, job: SweepJob) -> list[str]:
        """All overrides of a job; the last two place it in this sweep's folder in any case."""
        path = quote(str(self.folder.path))
        folders = [f"hydra.sweep.dir={path}", f"hydra.sweep.subdir={quote(job.folder)}"]
        own = self.source.space.overrides_for(job.values)
        return [*own, *self.source.extra_overrides(job), *folders]

    def _on_job_end(self, number: int) -> None:
        job = self.jobs[number]
        outcome = self._log_status(number)
        if outcome.status == FAILED:
            job.failures += 1
            if self.config.sweep.on_error == "stop":
                self.folder.stop()
        self.source.on_job_end(job, outcome)
        self.folder.save()
        update_tables(self.folder.path)

    def _log_status(self, number: int) -> RunStatus:
        """Log how a job has ended, unless that has been logged before; return its status."""
        folder = self.folder.run_folder(self.jobs[number])
        outcome = read_run_status(folder)
        if self.logged_statuses.get(number) == outcome.status:
            return outcome
        self.logged_statuses[number] = outcome.status
        if outcome.status == FAILED:
            log.error("job %d failed: %s; see %s", number, outcome.error, folder)
        else:
            log.info("job %d %s: %s", number, outcome.status, _describe_value(outcome))
        return outcome


def _describe_value(outcome: RunStatus) -> str:
    goal = outcome.content.get("goal") or {}
    if outcome.value is None:
        return "no value of the goal"
    return f"best {goal.get('metric')}={outcome.value:.6g} in {outcome.content['seconds']:.1f} s"


@contextmanager
def sweep_logging(folder: SweepFolder) -> Iterator[None]:
    """Log messages about the sweep to its `sweep.log` as well."""
    folder.path.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder.path / "sweep.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
    logger = logging.getLogger("app.sweep")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
