"""Runs the jobs of a sweep by whichever launcher, and keeps its table."""

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
from app.distributed.launch.failures import RankFailure, one_line, record_rank_failure
from app.runtime.signals import (
    REASON_BY_SIGNAL,
    SAME_SIGNAL_SECONDS,
    StopReason,
    TrainingInterrupted,
    signal_handlers,
)
from app.sweep.folder import SweepFolder
from app.sweep.job import SweepJob
from app.sweep.launchers.external import is_running, request_stop
from app.sweep.outcome import FAILED, PENDING, RUNNING, RunStatus, read_run_status, record_failure
from app.sweep.report.write import update_tables

log = logging.getLogger(__name__)
BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"  # runs jobs in this process
LOOKS = 2.0  # seconds after which it is seen which jobs have ended elsewhere


class JobSource(Protocol):
    """Where jobs come from."""

    def next_job(self) -> SweepJob | None:
        """The next one; None where there is none now."""

    def extra_overrides(self, job: SweepJob) -> list[str]:
        """What else the job is told."""

    def on_job_end(self, job: SweepJob, outcome: RunStatus) -> None:
        """A job has ended, in whatever way."""


class BatchLauncher(Protocol):
    """A launcher of Hydra's, as much of it as is used here."""

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Runs jobs, and waits for all of them."""


@runtime_checkable
class StreamingLauncher(Protocol):
    """A launcher that takes the next job as soon as there is room for it."""

    def stream(
        self,
        take: Callable[[], tuple[int, Sequence[str]] | None],
        ended: Callable[[int], None],
    ) -> None:
        """Runs jobs until there is none left."""


class SweepDriver:
    """One go at a sweep.

    Args:
        folder: Of the sweep.
        source: Where jobs come from.
        launcher: Who runs them.
        on_error: What follows a failed job.
        config: Of the sweep, as Hydra composed it.
        loader: Composes the jobs'.
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
        self.taken: dict[int, SweepJob] = {}
        self.reported: dict[int, str] = {}  # how jobs have ended, where it is in the log already
        self.is_stopped = False
        self.signals: list[int] = []  # asked to stop by, while jobs run elsewhere
        self.first_asked = 0.0

    def run(self, at_once: int) -> None:
        """All jobs.

        Args:
            at_once: How many are handed to a launcher that runs them together.
        """
        self.folder.set_stopped(stopped=False)
        if isinstance(self.launcher, StreamingLauncher):
            self.launcher.stream(self._next, self._ended)
            return
        while jobs := list(self._batch(at_once)):
            self._launch(jobs)

    def _take(self) -> SweepJob | None:
        job = None if self.is_stopped else self.source.next_job()
        if job is not None:
            self.taken[job.number] = job
        return job

    def _next(self) -> tuple[int, Sequence[str]] | None:
        job = self._take()
        return None if job is None else (job.number, self._words(job))

    def _batch(self, at_once: int) -> Iterator[SweepJob]:
        count = 0
        while count < at_once and (job := self._take()) is not None:
            count += 1
            yield job

    def _words(self, job: SweepJob) -> list[str]:
        """All that a job is told; the folder is this one, whatever its own words would make it."""
        path = quote(str(self.folder.path))
        where = [f"hydra.sweep.dir={path}", f"hydra.sweep.subdir={quote(job.folder)}"]
        return [*job.overrides, *self.source.extra_overrides(job), *where]

    def _launch(self, jobs: list[SweepJob]) -> None:
        """Through Hydra's own interface; a job that cannot be composed fails alone."""
        sound = [job for job in jobs if self._composes(job)]
        results: Sequence[JobReturn] = []
        if sound:
            results = self._results(sound)
        for job, result in zip_longest(sound, results):
            self._settle(job, result)
        for job in jobs:
            self._ended(job.number)
        if self.signals:
            raise TrainingInterrupted(
                max(REASON_BY_SIGNAL[signal.Signals(one).name] for one in self.signals)
            )

    def _results(self, jobs: list[SweepJob]) -> Sequence[JobReturn]:
        words, first = [self._words(job) for job in jobs], jobs[0].number
        if self.config.hydra.launcher._target_ == BASIC:
            return self.launcher.launch(words, initial_job_idx=first)  # type: ignore[no-any-return]
        with signal_handlers(self._hear), self._telling(jobs):
            try:
                return self.launcher.launch(words, initial_job_idx=first)  # type: ignore[no-any-return]
            except KeyboardInterrupt:
                for job in jobs:
                    self._settle(job, None)
                raise
            except (Exception, SystemExit) as error:  # of whichever library it is
                log.error("the launcher gave up: %s", one_line(error).splitlines()[0])
                log.debug("it came from", exc_info=error)
                self.is_stopped = True
                request_stop(self.folder)
                while any(is_running(self.folder, self.folder.run_folder(job)) for job in jobs):
                    time.sleep(0.2)
        return []

    def _hear(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Jobs elsewhere learn it from the folder; the second Ctrl-C does not wait for them."""
        again = number in self.signals and time.monotonic() - self.first_asked > SAME_SIGNAL_SECONDS
        if again and REASON_BY_SIGNAL[signal.Signals(number).name] is StopReason.INTERRUPTED:
            raise KeyboardInterrupt
        if not self.signals:
            self.first_asked = time.monotonic()
            sys.stderr.write("\nall jobs stop after this step; Ctrl-C again does not wait for it\n")
        self.signals.append(number)
        request_stop(self.folder)

    @contextmanager
    def _telling(self, jobs: list[SweepJob]) -> Iterator[None]:
        """The log says which jobs have ended as soon as they have."""
        over = threading.Event()
        thread = threading.Thread(target=self._tell_of, args=(jobs, over), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _tell_of(self, jobs: list[SweepJob], over: threading.Event) -> None:
        earlier = {job.number: read_run_status(self.folder.run_folder(job)) for job in jobs}
        while not over.wait(LOOKS):
            for job in jobs:
                outcome = read_run_status(self.folder.run_folder(job))
                if outcome.status not in (PENDING, RUNNING) and outcome != earlier[job.number]:
                    self._tell(job, outcome)

    def _settle(self, job: SweepJob, result: JobReturn | None) -> None:
        """What a job no longer said itself stands in its folder."""
        folder = self.folder.run_folder(job)
        status = read_run_status(folder).status
        if status not in (PENDING, RUNNING) or is_running(self.folder, folder):
            return
        if status == RUNNING and self.signals:
            record_rank_failure(folder, RankFailure(0, "interrupted", "KeyboardInterrupt"))
        elif status == RUNNING or not self.folder.is_stopped:
            record_failure(self._made(job), _failure(result))

    def _composes(self, job: SweepJob) -> bool:
        try:
            self.loader.load_sweep_config(self.config, self._words(job))
        except (HydraException, OmegaConfBaseException) as error:
            record_failure(self._made(job), RankFailure.from_exception(0, error))
            return False
        return True

    def _made(self, job: SweepJob) -> Path:
        folder = self.folder.run_folder(job)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _ended(self, number: int) -> None:
        job = self.taken[number]
        outcome = read_run_status(self.folder.run_folder(job))
        if outcome.status == FAILED:
            job.failures += 1
            self.is_stopped = self.is_stopped or self.on_error == "stop"
        self._tell(job, outcome)
        self.source.on_job_end(job, outcome)
        self.folder.save()
        update_tables(self.folder.path)

    def _tell(self, job: SweepJob, outcome: RunStatus) -> None:
        if self.reported.get(job.number) == outcome.status:
            return
        self.reported[job.number] = outcome.status
        if outcome.status == FAILED:
            log.error(
                "job %d failed: %s; see %s", job.number, outcome.error, self.folder.run_folder(job)
            )
        else:
            log.info("job %d %s: %s", job.number, outcome.status, _told(outcome))


def _failure(result: JobReturn | None) -> RankFailure:
    if result is None:
        return RankFailure(0, "died", "it is gone without a word")
    if result.status is JobStatus.FAILED and isinstance(result._return_value, BaseException):
        return RankFailure.from_exception(0, result._return_value)
    return RankFailure(0, "died", "it is gone without a word")


def _told(outcome: RunStatus) -> str:
    goal = outcome.content.get("goal") or {}
    if outcome.value is None:
        return "no value"
    return f"best {goal.get('metric')}={outcome.value:.6g} in {outcome.content['seconds']:.1f} s"


@contextmanager
def sweep_logging(folder: SweepFolder) -> Iterator[None]:
    """What is said of the sweep stands in `sweep.log`, too."""
    folder.path.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder.path / "sweep.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
    own = logging.getLogger("app.sweep")
    own.addHandler(handler)
    try:
        yield
    finally:
        own.removeHandler(handler)
        handler.close()
