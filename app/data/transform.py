"""Transform of stored batches into the inputs of the model, and statistics for normalization."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms import v2

from app.runtime.errors import UserError
from app.runtime.nested import Key, pick

Augment = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class BatchTransform:
    """Scales bytes to [0, 1], resizes, augments, normalizes, and sets channels and memory format.

    Attributes:
        mean: Per channel, on the device; None skips normalization.
        std: Per channel, on the device; None skips normalization.
        size: Height and width in pixels to resize to, or None.
        channels: Number of channels of the result, or None to keep it.
        memory_format: Memory format of the result, if it is a batch of images.
        augment: Augmentations, applied in order.
    """

    mean: Tensor | None
    std: Tensor | None
    size: int | None
    channels: int | None
    memory_format: torch.memory_format
    augment: Sequence[Augment] = ()

    def __call__(self, x: Tensor) -> Tensor:
        """Transform a uint8 or float batch to float32; other integer tensors are returned as is."""
        if not (x.dtype == torch.uint8 or x.is_floating_point()):
            return x
        # Operations below are in place: allocating a tensor for each one would dominate the cost.
        x = x.float().div_(255) if x.dtype == torch.uint8 else x.clone()
        if self._resize is not None:
            x = self._resize(x)
        for augment in self.augment:
            x = augment(x)
        if self.mean is not None and self.std is not None:
            x = x.sub_(self.mean).div_(self.std)
        if x.ndim != 4:
            return x
        if self.channels is not None and x.shape[1] != self.channels:
            x = self._convert_channels(x)
        return x.contiguous(memory_format=self.memory_format)

    @cached_property
    def _resize(self) -> Augment | None:
        return v2.Resize([self.size, self.size], antialias=True) if self.size else None

    def _convert_channels(self, x: Tensor) -> Tensor:
        if (x.shape[1], self.channels) == (1, 3):
            return x.expand(-1, 3, -1, -1)
        if (x.shape[1], self.channels) == (3, 1):
            gray: Tensor = v2.functional.rgb_to_grayscale(x)
            return gray
        raise UserError(
            f"data.channels={self.channels}, but the images have {x.shape[1]}; allowed "
            "conversions: 1 to 3 and 3 to 1"
        )


def channel_statistics(dataset: Dataset[Any], inputs: Key = 0) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel (images) or column (tables).

    Bytes are scaled to [0, 1] first. A standard deviation of 0 is returned as 1.

    Args:
        dataset: A dataset in memory.
        inputs: Key of the inputs among its tensors.

    Raises:
        UserError: The dataset is not in memory, or there are several inputs.
    """
    if not isinstance(dataset, TensorDataset):
        raise UserError(
            "data.normalize=auto needs a dataset in memory; set data.normalize.mean and std, "
            "or data.normalize=null"
        )
    x = pick(dataset.tensors, inputs)
    if not isinstance(x, Tensor):
        raise UserError(
            f"data.normalize=auto needs a single input, not data.inputs={inputs!r}; set "
            "data.normalize.mean and std"
        )
    dims = [d for d in range(x.ndim) if d != 1]
    scale = 255.0 if x.dtype == torch.uint8 else 1.0
    values = x.double() / scale
    std = values.std(dims, correction=0)
    return values.mean(dims).tolist(), torch.where(std > 0, std, torch.ones_like(std)).tolist()
