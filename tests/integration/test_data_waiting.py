"""Data that does not arrive: notices in the log, and an error after the time limit."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, Subset

from app.data.batch import BatchPreparer
from app.data.loaders import DataLoaderOptions, ExternalLoader, IterableLoader, SampleLoader
from app.data.sampling import EpochSampler
from app.data.waiting import ReadTracker, watch_batches
from app.runtime.errors import UserError
from app.runtime.signals import signal_handlers

PREPARE = BatchPreparer(torch.device("cpu"))
BLOCKED = 5


def block(kind: str) -> None:
    if kind == "sleep":
        time.sleep(1000)
    if kind == "stop":  # a process in this state does not handle signals
        os.kill(os.getpid(), signal.SIGSTOP)
    if kind == "pipe":
        ends = os.pipe()
        os.read(ends[0], 1)
    if kind == "retry":  # code that handles every error
        while True:
            try:
                time.sleep(1000)
            except Exception:  # noqa: BLE001
                continue


class BlockingSamples(Dataset[Any]):
    """Reading sample 5 never ends; every other takes `seconds`."""

    def __init__(self, kind: str = "", seconds: float = 0.0) -> None:
        self.kind, self.seconds = kind, seconds
        self.names = [f"{index}.png" for index in range(12)]

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        if index == BLOCKED:
            block(self.kind)
        time.sleep(self.seconds)
        return torch.zeros(2), 0


class BlockingStream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        samples = BlockingSamples("sleep")
        return (samples[index] for index in range(12))


def sample_loader(dataset: Dataset[Any], workers: int, timeout: float) -> SampleLoader:
    options = DataLoaderOptions(num_workers=workers, timeout=timeout)
    return SampleLoader(dataset, EpochSampler(12, 12, None), 4, PREPARE, 0, options)


@pytest.mark.parametrize(
    ("workers", "kind", "reader"),
    [
        (0, "sleep", "the main process"),
        (0, "pipe", "the main process"),
        (0, "retry", "the main process"),
        (2, "sleep", "worker 1"),
        (2, "stop", "worker 1"),
    ],
)
def test_blocked_sample_is_named_in_log_and_error(
    caplog: pytest.LogCaptureFixture, workers: int, kind: str, reader: str
) -> None:
    seconds = 5.0 if workers else 2.0  # workers may start slowly
    loader = sample_loader(BlockingSamples(kind), workers, seconds)
    place = f"{reader} is reading sample 5 (5.png)"
    with pytest.raises(UserError) as error, caplog.at_level(logging.WARNING):
        list(loader.epoch(1))
    assert str(error.value) == f"no data for {seconds:g} s (data.loader.timeout): {place}"
    assert "waiting for data for " in caplog.text
    assert place in caplog.text


def test_sample_of_subset_is_named_by_its_index_in_the_dataset() -> None:
    subset = Subset(BlockingSamples("sleep"), [7, BLOCKED])
    options = DataLoaderOptions(timeout=2.0)
    loader = SampleLoader(subset, EpochSampler(2, 2, None), 2, PREPARE, 0, options)
    for read in (lambda: loader.first(2), lambda: list(loader.epoch(1))):
        with pytest.raises(UserError, match=r"the main process is reading sample 5 \(5\.png\)"):
            read()


@pytest.mark.parametrize(("workers", "reader"), [(0, "the main process"), (1, "worker 0")])
def test_blocked_iterable_dataset_is_named(workers: int, reader: str) -> None:
    options = DataLoaderOptions(num_workers=workers, timeout=5.0)
    loader = IterableLoader(BlockingStream(), 4, PREPARE, None, 0, options)
    batches = loader.epoch(1)
    assert len(next(batches)[0]) == 4  # type: ignore[index,call-overload]
    with pytest.raises(UserError, match=rf"timeout\): {reader} is reading sample 5$"):
        next(batches)


@pytest.mark.parametrize("workers", [0, 1])
def test_slow_batch_whose_samples_arrive_is_no_error(workers: int) -> None:
    loader = sample_loader(BlockingSamples(seconds=0.9), workers, 3.0)  # 3.6 s per batch
    assert next(loader.epoch(1)) is not None


def test_time_limit_begins_again_after_a_sample_was_read() -> None:
    """Nothing is read while a batch is put together, or at an instant between two samples."""
    tracker = ReadTracker(BlockingSamples(), 0)

    def batches() -> Iterator[int]:
        tracker.begin(0)
        time.sleep(1.5)
        tracker.end()
        time.sleep(1.0)
        yield 0

    assert list(watch_batches(batches(), 2.0, tracker)) == [0]


def test_error_that_comes_too_late_is_not_that_of_the_next_waiting() -> None:
    tracker = ReadTracker(BlockingSamples(), 0)

    def batches() -> Iterator[int]:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGURG])  # ends as the limit is reached
        time.sleep(0.5)
        yield 0
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGURG])
        tracker.begin(BLOCKED)
        time.sleep(1000)

    waiting = watch_batches(batches(), 0.3, tracker)
    assert next(waiting) == 0
    with pytest.raises(UserError, match=r"the main process is reading sample 5 \(5\.png\)"):
        next(waiting)


def test_time_between_batches_does_not_count() -> None:
    for _ in watch_batches(range(2), 1.0):
        time.sleep(1.5)


def test_unknown_source_is_an_error_without_a_sample() -> None:
    loader = torch.utils.data.DataLoader(BlockingSamples("sleep"), 4)
    assert isinstance(ExternalLoader(loader, PREPARE).loader, torch.utils.data.DataLoader)
    with pytest.raises(UserError, match=r"^no data for 0\.3 s \(data\.loader\.timeout\)$"):
        list(watch_batches(loader, 0.3))


def test_watching_keeps_signal_handlers() -> None:
    received: list[int] = []
    with signal_handlers(lambda number, _: received.append(number), ["SIGURG"]):
        batches = watch_batches(range(3), 10)
        assert next(batches) == 0
        signal.raise_signal(signal.SIGURG)
        batches.close()  # type: ignore[attr-defined]
        signal.raise_signal(signal.SIGURG)
    assert received == [signal.SIGURG] * 2


class FailingSamples(Dataset[Any]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        if index == BLOCKED:
            raise UserError("sample 5 is damaged")
        return torch.zeros(2), 0


class FailingStream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        samples = FailingSamples()
        return (samples[index] for index in range(12))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("drop_last", [False, True])
def test_error_of_the_user_in_a_dataset_is_one_line_wherever_it_is_read(
    workers: int, drop_last: bool
) -> None:
    options, dataset = DataLoaderOptions(workers), FailingSamples()
    sampler = EpochSampler.from_limit(12, 4, None, None)
    for loader in (
        SampleLoader(dataset, sampler, 4, PREPARE, 0, options),
        IterableLoader(FailingStream(), 4, PREPARE, None, 0, options, drop_last),
    ):
        batches = loader.epoch(1)
        next(batches)
        with pytest.raises(UserError) as caught:
            next(batches)
        assert str(caught.value) == "sample 5 is damaged"
