"""Batches on the training device, in an order that depends on (seed, epoch) alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset, default_collate

from app.config.errors import UserError
from app.data.split import Samples, size
from app.seed import seed_host, seed_of

Batch = tuple[Tensor, Tensor]
Transform = Callable[[Tensor], Tensor]


class Batches(Protocol):
    """What the loop asks of data."""

    num_samples: int

    def __len__(self) -> int:
        """Batches in an epoch."""

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of that epoch: inputs and targets on the training device."""

    def first(self, count: int) -> Batch:
        """The first samples of the dataset as a batch."""


@dataclass(frozen=True)
class Order:
    """Which samples come when.

    Attributes:
        total: Samples in the dataset.
        count: How many of them an epoch takes.
        shuffle_seed: None keeps the dataset's own order.
    """

    total: int
    count: int
    shuffle_seed: int | None

    @classmethod
    def limited(
        cls, total: int, batch_size: int, limit: int | float | None, shuffle_seed: int | None
    ) -> Order:
        """The order of as many batches as `limit` says: a number, a share, or None for all."""
        batches = -(-total // batch_size)
        wanted = max(1, int(limit * batches)) if isinstance(limit, float) else limit
        count = total if wanted is None else min(total, wanted * batch_size)
        return cls(total, count, shuffle_seed)

    def indices(self, epoch: int) -> Tensor:
        """Positions in the dataset, int64."""
        if self.shuffle_seed is None:
            return torch.arange(self.count)
        generator = torch.Generator().manual_seed(seed_of(self.shuffle_seed, "order", epoch))
        return torch.randperm(self.total, generator=generator)[: self.count]


class TensorLoader:
    """Batches of a dataset that lies whole in memory, by indexing; no Python per sample.

    Args:
        dataset: Two tensors of N samples.
        order: Which samples come when.
        batch_size: Of each batch but perhaps the last.
        transform: Applied to the inputs of a batch, on the device.
        device: Where batches go.
        on_device: Whether the whole dataset is moved there now.
    """

    def __init__(
        self,
        dataset: TensorDataset,
        order: Order,
        batch_size: int,
        transform: Transform,
        device: torch.device,
        on_device: bool,
    ) -> None:
        if len(dataset.tensors) != 2:
            raise UserError(
                f"a dataset of {len(dataset.tensors)} tensors; inputs and targets wanted"
            )
        self.tensors = [t.to(device) if on_device else t for t in dataset.tensors]
        self.order, self.batch_size = order, batch_size
        self.transform, self.device = transform, device
        self.num_samples = order.count

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        if self.order.shuffle_seed is None:
            for start in range(0, self.num_samples, self.batch_size):
                stop = min(start + self.batch_size, self.num_samples)
                yield self._ready(*(tensor[start:stop] for tensor in self.tensors))
        else:
            indices = self.order.indices(epoch).to(self.tensors[0].device)
            for index in indices.split(self.batch_size):
                yield self._ready(*(tensor[index] for tensor in self.tensors))

    def first(self, count: int) -> Batch:
        return self._ready(self.tensors[0][:count], self.tensors[1][:count])

    def _ready(self, x: Tensor, y: Tensor) -> Batch:
        return self.transform(to_device(x, self.device)), to_device(y, self.device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor there; from the host to a CUDA device without waiting."""
    if tensor.device.type == device.type:
        return tensor
    if device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class SampleLoader:
    """Batches of any map-style dataset, read sample by sample by torch's `DataLoader`.

    Args:
        dataset: Gives (input, target); random draws of a sample depend on (seed, epoch, sample).
        order: Which samples come when.
        batch_size: Of each batch but perhaps the last.
        transform: Applied to the inputs of a batch, on the device.
        device: Where batches go.
        seed: Of the samples' random draws.
        num_workers: Processes that read; 0 reads in this one.
        pin_memory: Of use for CUDA devices only.
        persistent_workers: Keep the processes from epoch to epoch.
        prefetch_factor: Batches that each process reads ahead.
    """

    def __init__(
        self,
        dataset: Samples,
        order: Order,
        batch_size: int,
        transform: Transform,
        device: torch.device,
        seed: int,
        num_workers: int,
        pin_memory: bool,
        persistent_workers: bool,
        prefetch_factor: int | None,
    ) -> None:
        self.sampler = _EpochSampler(order)
        self.transform, self.device = transform, device
        self.num_samples = order.count
        self.loader = DataLoader(
            _SeededSamples(dataset, seed),
            batch_size=batch_size,
            sampler=self.sampler,
            num_workers=num_workers,
            pin_memory=pin_memory and device.type == "cuda",
            persistent_workers=persistent_workers and num_workers > 0,
            prefetch_factor=prefetch_factor if num_workers > 0 else None,
            generator=torch.Generator().manual_seed(seed_of(seed, "workers")),
        )

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        self.sampler.epoch = epoch
        for x, y in self.loader:
            yield self._ready(x, y)

    def first(self, count: int) -> Batch:
        dataset = self.loader.dataset
        keys = [(0, index) for index in range(min(count, self.sampler.order.total))]
        x, y = default_collate([dataset[key] for key in keys])
        return self._ready(x, y)

    def _ready(self, x: Tensor, y: Tensor) -> Batch:
        return self.transform(to_device(x, self.device)), to_device(y, self.device)


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
