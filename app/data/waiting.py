"""Watch how long data is waited for: say so in the log, and fail after a time limit."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count, repeat
from multiprocessing.sharedctypes import RawArray
from types import FrameType
from typing import Any, NamedTuple, TypeVar

from torch.utils.data import Dataset, IterableDataset, Subset, get_worker_info

from app.runtime.errors import UserError
from app.runtime.signals import signal_handlers

log = logging.getLogger(__name__)
T = TypeVar("T")
FIRST_NOTICE_SECONDS = 30.0  # the next ones follow after twice the time each
POLL_SECONDS = 1.0
WAKE_SIGNAL = "SIGURG"  # is ignored by default, also where it arrives too late
NO_SAMPLE = -1


class Reading(NamedTuple):
    """A sample that is being read: by a worker, or by the main process (None), since when."""

    worker: int | None
    pid: int
    sample: int
    seconds: float


class ReadTracker:
    """Which sample each worker and the main process are reading, in memory that they share.

    Args:
        dataset: Where the samples come from; may know the names of their files.
        num_workers: Number of workers.
    """

    def __init__(self, dataset: Dataset[Any], num_workers: int) -> None:
        self.dataset, self.num_workers = dataset, num_workers
        slots = num_workers + 1  # the last one is that of the main process
        self.indices = RawArray("q", [NO_SAMPLE] * slots)
        self.pids, self.times = RawArray("q", slots), RawArray("d", slots)

    def begin(self, index: int) -> None:
        """Record that this process starts to read a sample."""
        slot = self._slot()
        self.times[slot], self.pids[slot] = time.monotonic(), os.getpid()
        self.indices[slot] = index

    def end(self) -> None:
        """Record that this process has read its sample."""
        self.indices[self._slot()] = NO_SAMPLE

    def _slot(self) -> int:
        worker = get_worker_info()
        return self.num_workers if worker is None else worker.id

    def slowest(self) -> Reading | None:
        """Return the sample that has been read for the longest time; None if none is."""
        now = time.monotonic()
        readings = [
            Reading(
                None if slot == self.num_workers else slot,
                self.pids[slot],
                index,
                now - self.times[slot],
            )
            for slot, index in enumerate(self.indices)
            if index != NO_SAMPLE
        ]
        return max(readings, key=lambda reading: reading.seconds, default=None)

    def describe(self, reading: Reading) -> str:
        """Return who reads which sample."""
        reader = "the main process" if reading.worker is None else f"worker {reading.worker}"
        return f"{reader} is reading sample {_describe_sample(self.dataset, reading.sample)}"


def _describe_sample(dataset: Any, index: int) -> str:
    """Return the index of a sample in the dataset that was split, and its file if it is known."""
    while isinstance(dataset, Subset):
        dataset, index = dataset.dataset, int(dataset.indices[index])
    names = getattr(dataset, "names", None) or getattr(dataset, "samples", None)
    if not isinstance(names, list) or index >= len(names):
        return str(index)
    name = names[index]
    return f"{index} ({name[0] if isinstance(name, tuple) else name})"


class TrackedStream(IterableDataset[Any]):
    """An iterable dataset that records which of its samples is being read.

    Args:
        dataset: The dataset; with several workers, each counts its own samples.
        tracker: Receives the positions.
    """

    def __init__(self, dataset: IterableDataset[Any], tracker: ReadTracker) -> None:
        self.dataset, self.tracker = dataset, tracker

    def __iter__(self) -> Iterator[Any]:
        """Yield the samples; after an error of the user in a worker only the error.

        A `DataLoader` would raise it with a traceback.
        """
        try:
            yield from self._read()
        except UserError as error:
            self.tracker.end()
            if get_worker_info() is None:
                raise
            yield from repeat(error)  # until the batch is complete

    def _read(self) -> Iterator[Any]:
        self.tracker.begin(0)
        samples, end = iter(self.dataset), object()
        for index in count():
            self.tracker.begin(index)
            sample = next(samples, end)
            self.tracker.end()
            if sample is end:
                return
            yield sample


class _WokenUpError(BaseException):
    """Interrupts what blocks the main thread; no error, so that no code handles it as one."""


class DataWatchdog:
    """Watches, in a thread, how long the main thread waits for data.

    Args:
        timeout: Seconds without a sample after which the waiting fails.
        tracker: Which samples are being read; None if that is unknown.
    """

    def __init__(self, timeout: float, tracker: ReadTracker | None = None) -> None:
        self.timeout, self.tracker = timeout, tracker
        self.since: float | None = None  # when the current waiting began
        self.error: UserError | None = None  # why the current waiting ends
        self.lock, self.done = threading.Lock(), threading.Event()
        self.pid, self.waiting_thread = os.getpid(), threading.get_ident()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the thread inside the `with` block."""
        thread = threading.Thread(target=self._watch, name="data watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.done.set()
            thread.join()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Watch the time inside the `with` block.

        Raises:
            UserError: There was no data for too long.
        """
        with signal_handlers(self._on_wake_up, [WAKE_SIGNAL]):
            self.waiting_thread = threading.get_ident()
            with self.lock:  # an error that came too late for the last waiting is not one of this
                self.since, self.error = time.monotonic(), None
            try:
                try:
                    yield
                finally:
                    self.since = None
            except (_WokenUpError, RuntimeError) as error:  # RuntimeError: a worker was killed
                if self.error is None:
                    raise
                raise self.error from error

    def _watch(self) -> None:
        notice = first_notice = min(FIRST_NOTICE_SECONDS, self.timeout / 2)
        last_read = 0.0  # when a sample was last seen to be read
        while not self.done.wait(min(POLL_SECONDS, self.timeout / 10)):
            since, now = self.since, time.monotonic()
            seconds = 0.0 if since is None else now - since
            reading = self.tracker.slowest() if self.tracker and seconds else None
            last_read = last_read if reading is None else now
            stuck = min(seconds, now - last_read) if reading is None else reading.seconds
            if seconds < first_notice:
                notice = first_notice
            elif seconds >= self.timeout and stuck >= self.timeout:
                with self.lock:
                    if self.since == since:
                        self._end_waiting(reading)
            elif seconds >= notice:
                log.warning("waiting for data for %.0f s%s", seconds, self._describe(reading))
                notice *= 2

    def _describe(self, reading: Reading | None) -> str:
        return f": {self.tracker.describe(reading)}" if self.tracker and reading else ""

    def _end_waiting(self, reading: Reading | None) -> None:
        """End the worker that is stuck, which ends the waiting, or interrupt the main thread."""
        if self.error is None:
            problem = f"no data for {self.timeout:g} s (data.loader.timeout)"
            self.error = UserError(f"{problem}{self._describe(reading)}")
        if reading is not None and reading.worker is not None:
            with suppress(ProcessLookupError):
                os.kill(reading.pid, signal.SIGKILL)
        elif hasattr(signal, WAKE_SIGNAL):
            signal.pthread_kill(self.waiting_thread, getattr(signal, WAKE_SIGNAL))

    def _on_wake_up(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.error is not None and self.since is not None and os.getpid() == self.pid:
            raise _WokenUpError


def watch_batches(
    batches: Iterable[T], timeout: float, tracker: ReadTracker | None = None
) -> Iterator[T]:
    """Yield the batches, and watch how long each of them takes.

    Args:
        batches: Usually a `DataLoader`.
        timeout: Seconds without a sample after which an error is raised.
        tracker: Which samples are being read; None if that is unknown.

    Raises:
        UserError: There was no data for too long.
    """
    watchdog, end = DataWatchdog(timeout, tracker), object()
    with watchdog.running():
        with watchdog.waiting():
            iterator = iter(batches)
        while True:
            with watchdog.waiting():
                batch: Any = next(iterator, end)
            if batch is end:
                return
            yield batch


def watch_call(function: Callable[[], T], timeout: float, tracker: ReadTracker) -> T:
    """Call a function that reads samples in this process, and watch how long it takes.

    Raises:
        UserError: There was no data for too long.
    """
    watchdog = DataWatchdog(timeout, tracker)
    with watchdog.running(), watchdog.waiting():
        return function()
