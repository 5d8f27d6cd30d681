"""Batches on the training device, in an order that depends on (seed, epoch) alone."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    TensorDataset,
    default_collate,
)

from app.data.batch import Batch, BatchLoader, BatchPreparer, Transform
from app.data.sampling import EpochSampler
from app.data.split import size
from app.distributed.collectives import is_distributed, local_slice
from app.runtime.errors import UserError
from app.runtime.nested import count_samples, map_tensors, slice_batch
from app.runtime.seed import derive_seed, seed_cpu


class TensorLoader:
    """Batches of a dataset that lies whole in memory, by indexing; no Python per sample.

    Args:
        dataset: Tensors of N samples; a batch is a tuple of as many.
        order: Which samples come when.
        batch_size: Of each batch but perhaps the last.
        ready: What is done to a batch.
        on_device: Whether the whole dataset is moved there now.
    """

    def __init__(
        self,
        dataset: TensorDataset,
        order: EpochSampler,
        batch_size: int,
        ready: BatchPreparer,
        on_device: bool,
    ) -> None:
        self.tensors = [t.to(ready.device) if on_device else t for t in dataset.tensors]
        self.order, self.batch_size, self.ready = order, batch_size, ready
        self.num_samples = order.count
        self.num_batches = -(-order.count // batch_size)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        for index in self._indices(epoch):
            empty = index.start == index.stop if isinstance(index, slice) else not len(index)
            yield None if empty else self.ready(tuple(tensor[index] for tensor in self.tensors))

    def _indices(self, epoch: int) -> Iterator[slice | Tensor]:
        """Of this rank's share of each batch."""
        if self.order.is_plain:
            for start in range(0, self.num_samples, self.batch_size):
                mine = local_slice(min(self.batch_size, self.num_samples - start))
                yield slice(start + mine.start, start + mine.stop)
        else:
            indices = self.order.indices(epoch).to(self.tensors[0].device)
            for index in indices.split(self.batch_size):
                yield index[local_slice(len(index))]

    def indices(self, epoch: int, step: int) -> Tensor:
        """Positions in the dataset of the samples of a batch, counted from 1."""
        return self.order.of_batch(epoch, step, self.batch_size)

    def first(self, count: int) -> Batch:
        return self.ready(tuple(tensor[:count] for tensor in self.tensors))


def load(
    data: Dataset[Any] | DataLoader[Any],
    batch_size: int = 1,
    shuffle: bool = False,
    device: torch.device = torch.device("cpu"),  # noqa: B008
    transform: Transform | None = None,
    seed: int = 0,
) -> BatchLoader:
    """Batches for a `Trainer` that is built from Python.

    Args:
        data: A dataset of any kind, or a `DataLoader`, which keeps its own batches and order.
        batch_size: Of each batch but perhaps the last.
        shuffle: In an order that depends on (seed, epoch) alone.
        device: Where batches go.
        transform: Applied to the inputs of a batch, on the device.
        seed: Of the order, and of random draws in samples.
    """
    ready = BatchPreparer(device, transform)
    if isinstance(data, DataLoader):
        return ExternalLoader(data, ready)
    if isinstance(data, IterableDataset):
        return IterableLoader(data, batch_size, ready, None, seed, DataLoaderOptions())
    order = EpochSampler.limited(size(data), batch_size, None, seed if shuffle else None)
    if isinstance(data, TensorDataset):
        return TensorLoader(data, order, batch_size, ready, on_device=True)
    return SampleLoader(data, order, batch_size, ready, seed, DataLoaderOptions())


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataLoaderOptions:
    """How samples are read, as arguments of torch's `DataLoader`.

    Attributes:
        num_workers: Processes that read; 0 reads in this one.
        pin_memory: Of use for CUDA devices only.
        persistent_workers: Keep the processes from epoch to epoch.
        prefetch_factor: Batches that each process reads ahead.
    """

    num_workers: int = 0
    pin_memory: bool = True
    persistent_workers: bool = False
    prefetch_factor: int | None = None

    def arguments(self, device: torch.device, seed: int) -> dict[str, Any]:
        """For a `DataLoader` whose batches go to that device."""
        return {
            "num_workers": self.num_workers,
            "pin_memory": self.pin_memory and device.type == "cuda",
            "persistent_workers": self.persistent_workers and self.num_workers > 0,
            "prefetch_factor": self.prefetch_factor if self.num_workers > 0 else None,
            "generator": torch.Generator().manual_seed(derive_seed(seed, "workers")),
        }


class SampleLoader:
    """Batches of any map-style dataset, read sample by sample by torch's `DataLoader`.

    Args:
        dataset: Gives samples of any form; random draws of a sample depend on (seed, epoch,
            sample).
        order: Which samples come when.
        batch_size: Of each batch but perhaps the last.
        ready: What is done to a batch.
        seed: Of the samples' random draws.
        reading: By how many processes, and how.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        order: EpochSampler,
        batch_size: int,
        ready: BatchPreparer,
        seed: int,
        reading: DataLoaderOptions,
    ) -> None:
        self.sampler, self.ready = _BatchSampler(order, batch_size), ready
        self.num_samples = order.count
        self.loader = DataLoader(
            _SeededSamples(dataset, seed),
            batch_sampler=self.sampler,
            collate_fn=_collate,
            **reading.arguments(ready.device, seed),
        )
        self.num_batches = len(self.sampler)
        self.names: list[str] | None = None  # of the samples, where they have some

    def epoch(self, epoch: int) -> Iterator[Batch]:
        self.sampler.epoch = epoch
        for batch in self.loader:
            yield None if batch is None else self.ready(batch)

    def indices(self, epoch: int, step: int) -> Tensor:
        """Positions in the dataset of the samples of a batch, counted from 1."""
        return self.sampler.order.of_batch(epoch, step, self.sampler.batch_size)

    def first(self, count: int) -> Batch:
        dataset = self.loader.dataset
        keys = [(0, index) for index in range(min(count, self.sampler.order.total))]
        return self.ready(default_collate([dataset[key] for key in keys]))


class IterableLoader:
    """Batches of an iterable dataset, in the order in which it gives its samples.

    Every rank reads all of it, and keeps its share of each batch.

    Args:
        dataset: Gives samples of any form. Where it has `set_epoch(epoch)`, it is told the epoch;
            where it has no length, nobody knows how many samples there are. With several workers
            it must give each its own share (`torch.utils.data.get_worker_info`).
        batch_size: Of each batch but perhaps the last.
        ready: What is done to a batch.
        limit: Batches in an epoch at most, or None.
        seed: Of random draws, with the epoch.
        reading: By how many processes, and how.
        drop_last: Leaves out a short last batch.
    """

    def __init__(
        self,
        dataset: IterableDataset[Any],
        batch_size: int,
        ready: BatchPreparer,
        limit: int | None,
        seed: int,
        reading: DataLoaderOptions,
        drop_last: bool = False,
    ) -> None:
        if reading.persistent_workers and hasattr(dataset, "set_epoch"):
            reading = replace(reading, persistent_workers=False)  # else they never hear of it
        if reading.num_workers > 1:
            log.warning(
                "each of %d workers reads the whole iterable dataset, unless it gives each its own "
                "share by torch.utils.data.get_worker_info",
                reading.num_workers,
            )
        self.dataset, self.batch_size = dataset, batch_size
        self.ready, self.limit, self.seed = ready, limit, seed
        arguments = reading.arguments(ready.device, seed)
        self.generator = arguments["generator"]
        self.loader = DataLoader(dataset, batch_size=batch_size, drop_last=drop_last, **arguments)
        self.num_samples, self.num_batches = self._lengths(drop_last)

    def _lengths(self, drop_last: bool) -> tuple[int | None, int | None]:
        try:
            total = len(self.dataset)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            return None, self.limit
        total -= total % self.batch_size if drop_last else 0
        most = total if self.limit is None else min(total, self.limit * self.batch_size)
        return most, -(-most // self.batch_size)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        self._start(epoch)
        batches = drawn_alike(self.loader, self.seed, "stream", epoch)
        for batch in islice(batches, self.limit):
            mine = own_share(batch)
            yield None if mine is None else self.ready(mine)

    def first(self, count: int) -> Batch:
        self._start(0)
        few = list(islice(self.dataset, count))
        if not few:
            raise UserError("an iterable dataset gives no sample")
        return self.ready(default_collate(few))

    def _start(self, epoch: int) -> None:
        self.generator.manual_seed(derive_seed(self.seed, "stream", epoch))
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


class ExternalLoader:
    """Batches of a `DataLoader` that somebody else has made.

    Args:
        loader: In its own order.
        ready: What is done to a batch.
    """

    def __init__(self, loader: DataLoader[Any], ready: BatchPreparer) -> None:
        self.loader, self.ready = loader, ready
        try:
            self.num_batches: int | None = len(loader)
        except TypeError:
            self.num_batches = None
        whole = self.num_batches is not None and not isinstance(loader.dataset, IterableDataset)
        self.num_samples = size(loader.dataset) if whole else None

    def epoch(self, epoch: int) -> Iterator[Batch]:
        if hasattr(self.loader.sampler, "set_epoch"):
            self.loader.sampler.set_epoch(epoch)
        for batch in self.loader:
            mine = own_share(batch)
            yield None if mine is None else self.ready(mine)

    def first(self, count: int) -> Batch:
        return map_tensors(lambda tensor: tensor[:count], self.ready(next(iter(self.loader))))


def drawn_alike(loader: DataLoader[Any], *seed: int | str) -> Iterator[Batch]:
    """What a stream draws in this process is the same in all ranks, whatever else they draw."""
    if not is_distributed():
        yield from loader
        return
    with _own_randomness():
        seed_cpu(*seed)
        batches = iter(loader)  # a stream may draw its order now
        state = _host_state()
    nothing = object()
    while True:
        with _own_randomness():
            _set_host_state(state)
            batch = next(batches, nothing)
            state = _host_state()
        if batch is nothing:
            return
        yield batch


def own_share(batch: Batch) -> Batch:
    """This rank's part of a batch that every rank has read; None where it is empty."""
    if not is_distributed():
        return batch
    count = count_samples(batch)
    mine = local_slice(count)
    return None if mine.start == mine.stop else slice_batch(batch, mine, count)


class _BatchSampler(Sampler[list[tuple[int, int]]]):
    """Gives this rank's (epoch, index) of each batch: the workers learn the epoch from them."""

    def __init__(self, order: EpochSampler, batch_size: int) -> None:
        self.order, self.batch_size, self.epoch = order, batch_size, 0

    def __len__(self) -> int:
        return -(-self.order.count // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for indices in self.order.indices(self.epoch).split(self.batch_size):
            yield [(self.epoch, index) for index in indices[local_slice(len(indices))].tolist()]


def _collate(samples: list[Any]) -> Batch:
    return default_collate(samples) if samples else None


class _SeededSamples(Dataset[Any]):
    """Random draws in a sample are the same whichever process reads it."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return size(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        with _own_randomness():
            seed_cpu(self.seed, "sample", epoch, index)
            return self.dataset[index]


@contextmanager
def _own_randomness() -> Iterator[None]:
    state = _host_state()
    try:
        yield
    finally:
        _set_host_state(state)


def _host_state() -> tuple[Any, Any, torch.Tensor]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _set_host_state(state: tuple[Any, Any, torch.Tensor]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
