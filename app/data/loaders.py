"""Batches on the training device, in an order that depends on (seed, epoch) alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from app.data.batch import Batch, Batches, Ready, Transform
from app.data.order import Order
from app.data.reading import GivenLoader, Reading, SampleLoader, StreamLoader
from app.data.split import Samples, size
from app.distributed.collectives import share


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
        for index in self._indices(epoch):
            empty = index.start == index.stop if isinstance(index, slice) else not len(index)
            yield None if empty else self.ready(tuple(tensor[index] for tensor in self.tensors))

    def _indices(self, epoch: int) -> Iterator[slice | Tensor]:
        """Of this rank's share of each batch."""
        if self.order.is_plain:
            for start in range(0, self.num_samples, self.batch_size):
                mine = share(min(self.batch_size, self.num_samples - start))
                yield slice(start + mine.start, start + mine.stop)
        else:
            indices = self.order.indices(epoch).to(self.tensors[0].device)
            for index in indices.split(self.batch_size):
                yield index[share(len(index))]

    def indices(self, epoch: int, step: int) -> Tensor:
        """Positions in the dataset of the samples of a batch, counted from 1."""
        return self.order.of_batch(epoch, step, self.batch_size)

    def first(self, count: int) -> Batch:
        return self.ready(tuple(tensor[:count] for tensor in self.tensors))


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
