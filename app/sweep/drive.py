"""Runs the jobs of a sweep by whichever launcher, and keeps its table."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from hydra.core.config_loader import ConfigLoader
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from app.launch.failure import Failure
from app.sweep.finish import refresh
from app.sweep.folder import SweepFolder
from app.sweep.job import SweepJob
from app.sweep.outcome import FAILED, PENDING, RUNNING, Outcome, outcome_of, record_failure

log = logging.getLogger(__name__)


class Source(Protocol):
    """Where jobs come from."""

    def take(self) -> SweepJob | None:
        """The next one; None where there is none now."""

    def words(self, job: SweepJob) -> list[str]:
        """What else the job is told."""

    def ended(self, job: SweepJob, outcome: Outcome) -> None:
        """A job has ended, in whatever way."""


class Launches(Protocol):
    """A launcher of Hydra's, as much of it as is used here."""

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Runs jobs, and waits for all of them."""


@runtime_checkable
class Streams(Protocol):
    """A launcher that takes the next job as soon as there is room for it."""

    def stream(
        self,
        take: Callable[[], tuple[int, Sequence[str]] | None],
        ended: Callable[[int], None],
    ) -> None:
        """Runs jobs until there is none left."""


class Drive:
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
        source: Source,
        launcher: Any,
        on_error: Literal["continue", "stop"],
        config: DictConfig,
        loader: ConfigLoader,
    ) -> None:
        self.folder, self.source, self.launcher = folder, source, launcher
        self.on_error, self.config, self.loader = on_error, config, loader
        self.taken: dict[int, SweepJob] = {}
        self.is_stopped = False

    def run(self, at_once: int) -> None:
        """All jobs.

        Args:
            at_once: How many are handed to a launcher that runs them together.
        """
        self.folder.mark(stopped=False)
        if isinstance(self.launcher, Streams):
            self.launcher.stream(self._next, self._ended)
            return
        while jobs := list(self._batch(at_once)):
            self._launch(jobs)

    def _take(self) -> SweepJob | None:
        job = None if self.is_stopped else self.source.take()
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
        return [*job.words, *self.source.words(job), f"hydra.sweep.subdir='{job.folder}'"]

    def _launch(self, jobs: list[SweepJob]) -> None:
        """Through Hydra's own interface; a job that cannot be composed fails alone."""
        sound = [job for job in jobs if self._composes(job)]
        results: Sequence[JobReturn] = []
        if sound:
            words = [self._words(job) for job in sound]
            results = self.launcher.launch(words, initial_job_idx=sound[0].number)
        for job, result in zip(sound, results, strict=True):
            status = outcome_of(self.folder.of(job)).status
            if status == RUNNING or (status == PENDING and not self.folder.is_marked):
                record_failure(self._made(job), _failure(result))
        for job in jobs:
            self._ended(job.number)

    def _composes(self, job: SweepJob) -> bool:
        try:
            self.loader.load_sweep_config(self.config, self._words(job))
        except (HydraException, OmegaConfBaseException) as error:
            record_failure(self._made(job), Failure.of(0, error))
            return False
        return True

    def _made(self, job: SweepJob) -> Path:
        folder = self.folder.of(job)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _ended(self, number: int) -> None:
        job = self.taken[number]
        outcome = outcome_of(self.folder.of(job))
        if outcome.status == FAILED:
            job.failures += 1
            self.is_stopped = self.is_stopped or self.on_error == "stop"
            log.error("job %d failed: %s; see %s", number, outcome.error, self.folder.of(job))
        else:
            log.info("job %d %s: %s", number, outcome.status, _told(outcome))
        self.source.ended(job, outcome)
        self.folder.save()
        refresh(self.folder.path)


def _failure(result: JobReturn) -> Failure:
    if result.status is JobStatus.FAILED and isinstance(result._return_value, BaseException):
        return Failure.of(0, result._return_value)
    return Failure(0, "died", "it is gone without a word")


def _told(outcome: Outcome) -> str:
    goal = outcome.content.get("goal") or {}
    if outcome.value is None:
        return "no value"
    return f"best {goal.get('metric')}={outcome.value:.6g} in {outcome.content['seconds']:.1f} s"


@contextmanager
def logged(folder: SweepFolder) -> Iterator[None]:
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
