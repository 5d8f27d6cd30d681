"""Batches on the training device, in an order that depends on (seed, epoch) alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

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

from app.config.errors import UserError
from app.data.sampling import draw
from app.data.split import Samples, size
from app.nested import Nested, map_tensors, pick, put
from app.seed import seed_host, seed_of

Batch = Nested
Transform = Callable[[Tensor], Tensor]


class Batches(Protocol):
    """What the loop asks of data.

    Attributes:
        num_samples: In an epoch; None where that is not known.
        num_batches: Likewise.
    """

    @property
    def num_samples(self) -> int | None: ...

    @property
    def num_batches(self) -> int | None: ...

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of that epoch, on the training device."""

    def first(self, count: int) -> Batch:
        """The first samples of the dataset as a batch."""


@dataclass(frozen=True)
class Ready:
    """Brings a batch to the device and transforms its inputs there.

    Attributes:
        device: Where batches go.
        transform: Applied to each tensor of the inputs; None leaves them.
        inputs: Which part of a batch the inputs are: a position, a name, or several.
    """

    device: torch.device
    transform: Transform | None = None
    inputs: int | str | list[int | str] | None = 0

    def __call__(self, batch: Batch) -> Batch:
        batch = map_tensors(lambda tensor: to_device(tensor, self.device), batch)
        if self.transform is None:
            return batch
        if self.inputs is None:
            return map_tensors(self.transform, batch)
        for key in self.inputs if isinstance(self.inputs, list) else [self.inputs]:
            batch = put(batch, key, map_tensors(self.transform, pick(batch, key)))
        return batch


@dataclass(frozen=True)
class Order:
    """Which samples come when.

    Attributes:
        total: Samples in the dataset.
        count: How many of them an epoch takes.
        shuffle_seed: None keeps the dataset's own order.
        weights: How likely each sample is, drawn with replacement; None takes each once.
    """

    total: int
    count: int
    shuffle_seed: int | None
    weights: Tensor | None = None

    @classmethod
    def limited(
        cls,
        total: int,
        batch_size: int,
        limit: int | float | None,
        shuffle_seed: int | None,
        weights: Tensor | None = None,
    ) -> Order:
        """The order of as many batches as `limit` says: a number, a share, or None for all."""
        batches = -(-total // batch_size)
        wanted = max(1, int(limit * batches)) if isinstance(limit, float) else limit
        count = total if wanted is None else min(total, wanted * batch_size)
        return cls(total, count, shuffle_seed, weights)

    def of_whole_batches(self, batch_size: int) -> Order:
        """The same without a short last batch.

        Raises:
            UserError: Nothing is left.
        """
        count = self.count - self.count % batch_size
        if count == 0:
            raise UserError(f"data.drop_last: {self.count} samples make no batch of {batch_size}")
        return replace(self, count=count)

    @property
    def is_plain(self) -> bool:
        """Whether samples come as they stand in the dataset."""
        return self.shuffle_seed is None

    def indices(self, epoch: int) -> Tensor:
        """Positions in the dataset, int64."""
        if self.shuffle_seed is None:
            return torch.arange(self.count)
        seed = seed_of(self.shuffle_seed, "order", epoch)
        if self.weights is not None:
            return draw(self.weights, self.count, seed)
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(self.total, generator=generator)[: self.count]


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
        order: Order,
        batch_size: int,
        ready: Ready,
        on_device: bool,
    ) -> None:
        self.tensors = [t.to(ready.device) if on_device else t for t in dataset.tensors]
        self.order, self.batch_size, self.ready = order, batch_size, ready
        self.num_samples = order.count
        self.num_batches = -(-order.count // batch_size)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        if self.order.is_plain:
            for start in range(0, self.num_samples, self.batch_size):
                stop = min(start + self.batch_size, self.num_samples)
                yield self.ready(tuple(tensor[start:stop] for tensor in self.tensors))
        else:
            indices = self.order.indices(epoch).to(self.tensors[0].device)
            for index in indices.split(self.batch_size):
                yield self.ready(tuple(tensor[index] for tensor in self.tensors))

    def first(self, count: int) -> Batch:
        return self.ready(tuple(tensor[:count] for tensor in self.tensors))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor there; from the host to a CUDA device without waiting."""
    if tensor.device.type == device.type:
        return tensor
    if device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class Reading:
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
            "generator": torch.Generator().manual_seed(seed_of(seed, "workers")),
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
        dataset: Samples,
        order: Order,
        batch_size: int,
        ready: Ready,
        seed: int,
        reading: Reading,
    ) -> None:
        self.sampler, self.ready = _EpochSampler(order), ready
        self.num_samples = order.count
        self.loader = DataLoader(
            _SeededSamples(dataset, seed),
            batch_size=batch_size,
            sampler=self.sampler,
            **reading.arguments(ready.device, seed),
        )
        self.num_batches = len(self.loader)
        self.names: list[str] | None = None  # of the samples, where they have some

    def epoch(self, epoch: int) -> Iterator[Batch]:
        self.sampler.epoch = epoch
        for batch in self.loader:
            yield self.ready(batch)

    def first(self, count: int) -> Batch:
        dataset = self.loader.dataset
        keys = [(0, index) for index in range(min(count, self.sampler.order.total))]
        return self.ready(default_collate([dataset[key] for key in keys]))


class StreamLoader:
    """Batches of an iterable dataset, in the order in which it gives its samples.

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
        ready: Ready,
        limit: int | None,
        seed: int,
        reading: Reading,
        drop_last: bool = False,
    ) -> None:
        if reading.persistent_workers and hasattr(dataset, "set_epoch"):
            reading = replace(reading, persistent_workers=False)  # else they never hear of it
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
        for batch in islice(self.loader, self.limit):
            yield self.ready(batch)

    def first(self, count: int) -> Batch:
        self._start(0)
        few = list(islice(self.dataset, count))
        if not few:
            raise UserError("an iterable dataset gives no sample")
        return self.ready(default_collate(few))

    def _start(self, epoch: int) -> None:
        self.generator.manual_seed(seed_of(self.seed, "stream", epoch))
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


class GivenLoader:
    """Batches of a `DataLoader` that somebody else has made.

    Args:
        loader: In its own order.
        ready: What is done to a batch.
    """

    def __init__(self, loader: DataLoader[Any], ready: Ready) -> None:
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
            yield self.ready(batch)

    def first(self, count: int) -> Batch:
        return map_tensors(lambda tensor: tensor[:count], self.ready(next(iter(self.loader))))


def load(
    data: Samples | DataLoader[Any],
    batch_size: int = 1,
    shuffle: bool = False,
    device: torch.device = torch.device("cpu"),  # noqa: B008
    transform: Transform | None = None,
    seed: int = 0,
) -> Batches:
    """Batches for a `Trainer` that is built from Python.

    Args:
        data: A dataset of any kind, or a `DataLoader`, which keeps its own batches and order.
        batch_size: Of each batch but perhaps the last.
        shuffle: In an order that depends on (seed, epoch) alone.
        device: Where batches go.
        transform: Applied to the inputs of a batch, on the device.
        seed: Of the order, and of random draws in samples.
    """
    ready = Ready(device, transform)
    if isinstance(data, DataLoader):
        return GivenLoader(data, ready)
    if isinstance(data, IterableDataset):
        return StreamLoader(data, batch_size, ready, None, seed, Reading())
    order = Order.limited(size(data), batch_size, None, seed if shuffle else None)
    if isinstance(data, TensorDataset):
        return TensorLoader(data, order, batch_size, ready, on_device=True)
    return SampleLoader(data, order, batch_size, ready, seed, Reading())


class _EpochSampler(Sampler[tuple[int, int]]):
    """Gives (epoch, index): the workers learn the epoch with each sample."""

    def __init__(self, order: Order) -> None:
        self.order, self.epoch = order, 0

    def __len__(self) -> int:
        return self.order.count

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, index) for index in self.order.indices(self.epoch).tolist())


class _SeededSamples(Dataset[Any]):
    """Random draws in a sample are the same whichever process reads it."""

    def __init__(self, dataset: Samples, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return size(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        with _own_randomness():
            seed_host(self.seed, "sample", epoch, index)
            return self.dataset[index]


@contextmanager
def _own_randomness() -> Iterator[None]:
    python, numpy, tensor = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(tensor)
