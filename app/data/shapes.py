"""Segmentation data made by code: circles and rectangles on a noisy background."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

CIRCLE, RECTANGLE = 1, 2
FEWEST, MOST = 2, 4  # objects of an image


def shapes(count: int, size: int = 64, seed: int = 0, noise: float = 0.1) -> TensorDataset:
    """Images with two to four objects of random kind, place, size and brightness.

    Args:
        count: Of the images.
        size: Pixels of a side.
        seed: The same seed gives the same data.
        noise: Standard deviation of the noise on every pixel.

    Returns:
        Images, float32 in [0, 1] of shape (N, 1, size, size), and masks, int64 of shape
        (N, size, size): 0 for the background, 1 for circles, 2 for rectangles.

    Raises:
        ValueError: A count below 1, a size below 16, or a negative noise.
    """
    if count < 1 or size < 16 or noise < 0:
        raise ValueError(
            f"count={count}, size={size}, noise={noise}; allowed: at least 1, 16 and 0"
        )
    generator = torch.Generator().manual_seed(seed)
    images = _uniform(0.0, 0.3, count, generator)[:, None, None].repeat(1, size, size)
    masks = torch.zeros(count, size, size, dtype=torch.int64)
    objects = torch.randint(FEWEST, MOST + 1, (count,), generator=generator)
    for index in range(MOST):
        inside, kind = _objects(count, size, generator)
        inside &= (index < objects)[:, None, None]
        brightness = _uniform(0.5, 1.0, count, generator)[:, None, None]
        images = torch.where(inside, brightness, images)
        masks = torch.where(inside, kind[:, None, None], masks)
    images += noise * torch.randn(images.shape, generator=generator)
    return TensorDataset(images.clamp_(0, 1).unsqueeze(1), masks)


def _objects(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One object for each image: its pixels, bool of (N, size, size), and its class."""
    kind = torch.randint(CIRCLE, RECTANGLE + 1, (count,), generator=generator)
    half = _uniform(0.1, 0.2, (count, 2), generator)  # height and width, in shares of a side
    half[:, 1] = torch.where(kind == CIRCLE, half[:, 0], half[:, 1])
    centre = half + (1 - 2 * half) * _uniform(0.0, 1.0, (count, 2), generator)
    line = (torch.arange(size) + 0.5) / size
    rows = (line - centre[:, :1]).div(half[:, :1]).abs()[:, :, None]
    columns = (line - centre[:, 1:]).div(half[:, 1:]).abs()[:, None, :]
    circle = rows.square() + columns.square() <= 1
    rectangle = torch.maximum(rows, columns) <= 1
    return torch.where((kind == CIRCLE)[:, None, None], circle, rectangle), kind


def _uniform(
    low: float, high: float, shape: int | tuple[int, ...], generator: torch.Generator
) -> Tensor:
    shape = (shape,) if isinstance(shape, int) else shape
    return low + (high - low) * torch.rand(shape, generator=generator)
