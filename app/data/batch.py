"""What the loop asks of data, and what is done to every batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from app.runtime.nested import Nested, map_tensors, pick, replace

Batch = Nested
Transform = Callable[[Tensor], Tensor]


class BatchLoader(Protocol):
    """What the loop asks of data.

    With several ranks each gets its share of every batch; all else is of whole batches.

    Attributes:
        num_samples: In an epoch; None where that is not known.
        num_batches: Likewise.
    """

    @property
    def num_samples(self) -> int | None: ...

    @property
    def num_batches(self) -> int | None: ...

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of that epoch, on the training device; None for an empty share of one."""

    def first(self, count: int) -> Batch:
        """The first samples of the dataset as a batch."""


@dataclass(frozen=True)
class BatchPreparer:
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
            batch = replace(batch, key, map_tensors(self.transform, pick(batch, key)))
        return batch


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor there; from the host to a CUDA device without waiting."""
    if tensor.device.type == device.type:
        return tensor
    if device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
