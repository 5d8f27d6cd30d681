"""Adapter for transforms of torchvision, which draw their parameters once for a whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import transforms as v1
from torchvision.transforms import v2

from app.runtime.errors import UserError

Transform = Callable[[Tensor], Tensor]
DETERMINISTIC_V1 = (
    *(v1.CenterCrop, v1.ConvertImageDtype, v1.Grayscale, v1.LinearTransformation),
    *(v1.Normalize, v1.Pad, v1.Resize),
)


def per_image(transform: Transform) -> Transform:
    """Return a transform of batches that draws its random parameters for each image.

    Random transforms of torchvision are wrapped in `PerImage`. Everything else is returned as it
    is: the augmentations of this package, transforms that draw nothing, and your own functions,
    which receive whole batches.

    Raises:
        UserError: The transform mixes the images of a batch and needs their labels.
    """
    if isinstance(transform, (v2.MixUp, v2.CutMix)):
        name = type(transform).__name__
        raise UserError(f"{name} needs labels and cannot augment images; use task=mixup_cutmix")
    return PerImage(transform) if draws_once_per_batch(transform) else transform


class PerSample(nn.Module):
    """Applies a transform to the samples of a batch one after the other.

    Args:
        transform: A transform of single samples; its results must have the same size.
    """

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, batch: Tensor) -> Tensor:
        """Transform a batch of shape (N, ...).

        Raises:
            UserError: The results differ in size.
        """
        return self.stack([self.transform(sample) for sample in batch]) if len(batch) else batch

    def stack(self, results: Sequence[Tensor]) -> Tensor:
        """Make a batch of transformed samples.

        Raises:
            UserError: They differ in size.
        """
        if len({result.shape for result in results}) > 1:
            raise UserError(
                f"{self.transform} gives images of different sizes, which make no batch; "
                "add a transform that resizes or crops them"
            )
        return torch.stack([*results])


class PerImage(PerSample):
    """Applies a transform to each of some images of shape (N, C, H, W), or to one (C, H, W)."""

    def forward(self, images: Tensor) -> Tensor:
        return self.transform(images) if images.ndim == 3 else super().forward(images)


def draws_once_per_batch(transform: object) -> bool:
    """Return whether a transform of torchvision draws the same parameters for a whole batch.

    Of version 2, these are the transforms that override `make_params` or `forward`, and
    compositions that contain one. Those of version 1 count as such unless they are known to draw
    nothing.
    """
    if isinstance(transform, (v1.Compose, v2.Compose, nn.Sequential)):
        steps: Any = transform if isinstance(transform, nn.Sequential) else transform.transforms
        return any(draws_once_per_batch(step) for step in steps)
    if isinstance(transform, v2.Transform):
        own, base = type(transform), v2.Transform
        return own.make_params is not base.make_params or own.forward is not base.forward
    modules = [cls.__module__ for cls in type(transform).__mro__]
    is_v1 = any(module.startswith("torchvision.transforms.") for module in modules)
    return is_v1 and not isinstance(transform, DETERMINISTIC_V1)
