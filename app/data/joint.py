"""Transforms of images together with their masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import tv_tensors

from app.data.augment import Augmentation, PerSample
from app.runtime.errors import UserError


def transform_both(
    transform: Callable[..., Any], images: Tensor, masks: Tensor | None, outside: int
) -> tuple[Tensor, Tensor | None]:
    """Transform images, and their masks in the same way.

    Augmentations of this program move masks to the nearest label. All others are called with the
    image and the mask as `tv_tensors`, and return both: those of torchvision, version 2, move masks
    in the same way, and leave them alone if they only change colors.

    Args:
        transform: The transform.
        images: One image or a batch.
        masks: Labels of shape (H, W) or (N, H, W); None transforms the images alone.
        outside: Label of pixels outside of the image.

    Raises:
        UserError: The transform cannot transform masks.
    """
    if masks is None:
        return transform(images), None
    return _transform_pair(transform, images, masks, outside)


def _transform_pair(
    transform: Callable[..., Any], images: Tensor, masks: Tensor, outside: int
) -> tuple[Tensor, Tensor]:
    if isinstance(transform, Augmentation):
        return transform.transform_both(images, masks, outside)
    if not isinstance(transform, PerSample):
        return _call_with_both(transform, images, masks)
    if images.ndim == 3:
        return _transform_pair(transform.transform, images, masks, outside)
    pairs = [
        _transform_pair(transform.transform, image, mask, outside)
        for image, mask in zip(images, masks, strict=True)
    ]
    if not pairs:
        return images, masks
    return transform.stack([image for image, _ in pairs]), torch.stack([mask for _, mask in pairs])


def _call_with_both(
    transform: Callable[..., Any], images: Tensor, masks: Tensor
) -> tuple[Tensor, Tensor]:
    try:
        image, mask = transform(tv_tensors.Image(images), tv_tensors.Mask(masks))
        if image.shape[-2:] != mask.shape[-2:]:
            raise ValueError(f"image {tuple(image.shape)} and mask {tuple(mask.shape)} differ")
    except (TypeError, ValueError) as error:
        name = type(transform).__name__ if isinstance(transform, nn.Module) else repr(transform)
        raise UserError(
            f"{name} cannot transform images together with masks: {error}; allowed are "
            "augmentations of app.data.augment, transforms of torchvision.transforms.v2 that take "
            "masks, and functions of an image and a mask that return both"
        ) from error
    return image.as_subclass(Tensor), mask.as_subclass(Tensor)


def fill_masks(transform: object, outside: int) -> None:
    """Let a transform of torchvision fill masks with a label, rather than as it fills images."""
    # The argument `fill` takes values by type, which a configuration cannot name.
    if isinstance(fill := getattr(transform, "_fill", None), dict):
        fill[tv_tensors.Mask] = outside
    modules = transform.children() if isinstance(transform, nn.Module) else ()
    for step in (*modules, *getattr(transform, "transforms", ())):  # a Compose has a list of them
        fill_masks(step, outside)
