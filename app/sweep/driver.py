"""Run the jobs of a sweep with any launcher, and keep its tables up to date."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol, runtime_checkable

from hydra.core.config_loader import ConfigLoader
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from app.config.overrides import quote
from app.distributed.launch.failures import (
    NO_REPORT,
    RankFailure,
    format_error,
    record_rank_failure,
)
from app.runtime.signals import (
    DUPLICATE_SIGNAL_SECONDS,
    REASON_BY_SIGNAL,
    StopReason,
    TrainingInterrupted,
    signal_handlers,
)
from app.sweep.folder import SweepFolder
from app.sweep.job import SweepJob
from app.sweep.launchers import BASIC_LAUNCHER
from app.sweep.launchers.external import is_running, request_stop
from app.sweep.outcome import FAILED, PENDING, RUNNING, RunStatus, read_run_status, record_failure
from app.sweep.report.write import update_tables

log = logging.getLogger(__name__)
STATUS_POLL_SECONDS = 2.0  # how often the status files of external jobs are read


class JobSource(Protocol):
    """A sequence of jobs that may depend on the results of earlier ones."""

    def next_job(self) -> SweepJob | None:
        """Return the next job; None if there is none now."""

    def extra_overrides(self, job: SweepJob) -> list[str]:
        """Return overrides for a job in addition to its own."""

    def on_job_end(self, job: SweepJob, outcome: RunStatus) -> None:
        """Handle the end of a job, whatever its status."""


class BatchLauncher(Protocol):
    """The part of Hydra's launcher interface that is used here."""

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run jobs, and wait for all of them."""


@runtime_checkable
class StreamingLauncher(Protocol):
    """A launcher that takes the next job as soon as it has room for it."""

    def stream(
        self,
        next_job: Callable[[], tuple[int, Sequence[str]] | None],
        on_job_end: Callable[[int], None],
    ) -> None:
        """Run jobs until there are none left.

        Args:
            next_job: Returns the number and the overrides of the next job; None if there is none
                now.
            on_job_end: Called with the number of each job that has ended.
        """


class SweepDriver:
    """Runs the remaining jobs of a sweep.

    Args:
        folder: Folder of the sweep.
        source: Where jobs come from.
        launcher: Runs the jobs: a `StreamingLauncher` or a `BatchLauncher`.
        on_error: Whether to start further jobs after one has failed.
        config: Configuration of the sweep as composed by Hydra.
        loader: Composes the configurations of the jobs.
    """

    def __init__(
        self,
        folder: SweepFolder,
        source: JobSource,
        launcher: Any,
        on_error: Literal["continue", "stop"],
        config: DictConfig,
        loader: ConfigLoader,
    ) -> None:
        self.folder, self.source, self.launcher = folder, source, launcher
        self.on_error, self.config, self.loader = on_error, config, loader
        self.jobs: dict[int, SweepJob] = {}  # that were taken from the source, by number
        self.logged_statuses: dict[int, str] = {}  # by job number
        self.is_stopped = False
        self.signals: list[int] = []  # received while jobs ran in an external launcher
        self.first_signal_at = 0.0

    def run(self, batch_size: int) -> None:
        """Run all jobs.

        Args:
            batch_size: Jobs per call of a `BatchLauncher`.

        Raises:
            TrainingInterrupted: A signal has asked to stop, and all jobs have stopped.
        """
        self.folder.set_stopped(stopped=False)
        if isinstance(self.launcher, StreamingLauncher):
            self.launcher.stream(self._next_overrides, self._on_job_end)
            return
        while jobs := list(self._next_batch(batch_size)):
            self._launch(jobs)

    def _next_overrides(self) -> tuple[int, Sequence[str]] | None:
        job = self._next_job()
        return None if job is None else (job.number, self._overrides(job))

    def _next_batch(self, batch_size: int) -> Iterator[SweepJob]:
        count = 0
        while count < batch_size and (job := self._next_job()) is not None:
            count += 1
            yield job

    def _next_job(self) -> SweepJob | None:
        job = None if self.is_stopped else self.source.next_job()
        if job is not None:
            self.jobs[job.number] = job
        return job

    def _overrides(self, job: SweepJob) -> list[str]:
        """All overrides of a job; the last two place it in this sweep's folder in any case."""
        path = quote(str(self.folder.path))
        folders = [f"hydra.sweep.dir={path}", f"hydra.sweep.subdir={quote(job.folder)}"]
        return [*job.overrides, *self.source.extra_overrides(job), *folders]

    def _launch(self, jobs: list[SweepJob]) -> None:
        """Run jobs by Hydra's launcher interface; one that cannot be composed fails alone."""
        composable = [job for job in jobs if self._can_compose(job)]
        results: Sequence[JobReturn] = []
        if composable:
            results = self._launch_batch(composable)
        for job, result in zip_longest(composable, results):
            self._record_missing_status(job, result)
        for job in jobs:
            self._on_job_end(job.number)
        if self.signals:
            raise TrainingInterrupted(
                max(REASON_BY_SIGNAL[signal.Signals(number).name] for number in self.signals)
            )

    def _can_compose(self, job: SweepJob) -> bool:
        try:
            self.loader.load_sweep_config(self.config, self._overrides(job))
        except (HydraException, OmegaConfBaseException) as error:
            record_failure(self._make_run_folder(job), RankFailure.from_exception(0, error))
            return False
        return True

    def _launch_batch(self, jobs: list[SweepJob]) -> Sequence[JobReturn]:
        overrides, first = [self._overrides(job) for job in jobs], jobs[0].number
        if self.config.hydra.launcher._target_ == BASIC_LAUNCHER:
            return self.launcher.launch(overrides, initial_job_idx=first)  # type: ignore[no-any-return]
        with signal_handlers(self._on_signal), self._logging_job_ends(jobs):
            try:
                return self.launcher.launch(overrides, initial_job_idx=first)  # type: ignore[no-any-return]
            except KeyboardInterrupt:
                for job in jobs:
                    self._record_missing_status(job, None)
                raise
            except (Exception, SystemExit) as error:  # each launcher library has its own
                log.error("the launcher failed: %s", format_error(error).splitlines()[0])
                log.debug("traceback of the launcher", exc_info=error)
                self.is_stopped = True
                request_stop(self.folder)
                while any(is_running(self.folder, self.folder.run_folder(job)) for job in jobs):
                    time.sleep(0.2)
        return []

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Ask external jobs to stop through the folder; a second Ctrl-C does not wait for them."""
        is_repeated = (
            number in self.signals
            and time.monotonic() - self.first_signal_at > DUPLICATE_SIGNAL_SECONDS
        )
        if is_repeated and REASON_BY_SIGNAL[signal.Signals(number).name] is StopReason.INTERRUPTED:
            raise KeyboardInterrupt
        if not self.signals:
            self.first_signal_at = time.monotonic()
            sys.stderr.write("\nstopping all jobs after this step; Ctrl-C again exits at once\n")
        self.signals.append(number)
        request_stop(self.folder)

    @contextmanager
    def _logging_job_ends(self, jobs: list[SweepJob]) -> Iterator[None]:
        """Log in the background which external jobs have ended, as soon as they have."""
        is_done = threading.Event()
        thread = threading.Thread(target=self._log_job_ends, args=(jobs, is_done), daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_done.set()
            thread.join()

    def _log_job_ends(self, jobs: list[SweepJob], is_done: threading.Event) -> None:
        before = {job.number: read_run_status(self.folder.run_folder(job)) for job in jobs}
        while not is_done.wait(STATUS_POLL_SECONDS):
            for job in jobs:
                outcome = read_run_status(self.folder.run_folder(job))
                if outcome.status not in (PENDING, RUNNING) and outcome != before[job.number]:
                    self._log_outcome(job, outcome)

    def _record_missing_status(self, job: SweepJob, result: JobReturn | None) -> None:
        """Write the final status of a job whose process could not write it itself."""
        folder = self.folder.run_folder(job)
        status = read_run_status(folder).status
        if status not in (PENDING, RUNNING) or is_running(self.folder, folder):
            return
        if status == RUNNING and self.signals:
            record_rank_failure(folder, RankFailure(0, "interrupted", "KeyboardInterrupt"))
        elif status == RUNNING or not self.folder.is_stopped:
            record_failure(self._make_run_folder(job), _to_failure(result))

    def _make_run_folder(self, job: SweepJob) -> Path:
        folder = self.folder.run_folder(job)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _on_job_end(self, number: int) -> None:
        job = self.jobs[number]
        outcome = read_run_status(self.folder.run_folder(job))
        if outcome.status == FAILED:
            job.failures += 1
            self.is_stopped = self.is_stopped or self.on_error == "stop"
        self._log_outcome(job, outcome)
        self.source.on_job_end(job, outcome)
        self.folder.save()
        update_tables(self.folder.path)

    def _log_outcome(self, job: SweepJob, outcome: RunStatus) -> None:
        if self.logged_statuses.get(job.number) == outcome.status:
            return
        self.logged_statuses[job.number] = outcome.status
        if outcome.status == FAILED:
            folder = self.folder.run_folder(job)
            log.error("job %d failed: %s; see %s", job.number, outcome.error, folder)
        else:
            log.info("job %d %s: %s", job.number, outcome.status, _describe_value(outcome))


def _to_failure(result: JobReturn | None) -> RankFailure:
    if result is None:
        return RankFailure(0, "died", NO_REPORT)
    if result.status is JobStatus.FAILED and isinstance(result._return_value, BaseException):
        return RankFailure.from_exception(0, result._return_value)
    return RankFailure(0, "died", NO_REPORT)


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
