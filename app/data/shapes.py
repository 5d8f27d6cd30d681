"""Synthetic segmentation data: circles and rectangles on a noisy background."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

CIRCLE, RECTANGLE = 1, 2  # classes in the masks; 0 is the background
MIN_OBJECTS, MAX_OBJECTS = 2, 4  # per image


def shapes(count: int, size: int = 64, seed: int = 0, noise: float = 0.1) -> TensorDataset:
    """Generate images with two to four objects of random kind, place, size and brightness.

    Args:
        count: Number of images.
        size: Height and width in pixels.
        seed: The same seed gives the same data.
        noise: Standard deviation of the noise added to every pixel.

    Returns:
        Images, float32 in [0, 1] of shape (N, 1, size, size), and masks, int64 of shape
        (N, size, size): 0 for the background, 1 for circles, 2 for rectangles.

    Raises:
        ValueError: The count is below 1, the size below 16, or the noise negative.
    """
    check_arguments(count, size, noise)
    generator = torch.Generator().manual_seed(seed)
    images = draw_backgrounds(count, size, generator)
    masks = torch.zeros(count, size, size, dtype=torch.int64)
    num_objects = torch.randint(MIN_OBJECTS, MAX_OBJECTS + 1, (count,), generator=generator)
    for index in range(MAX_OBJECTS):
        inside, kind = draw_objects(count, size, generator)
        inside &= (index < num_objects)[:, None, None]
        brightness = uniform(0.5, 1.0, count, generator)[:, None, None]
        images = torch.where(inside, brightness, images)
        masks = torch.where(inside, kind[:, None, None], masks)
    images += noise * torch.randn(images.shape, generator=generator)
    return TensorDataset(images.clamp_(0, 1).unsqueeze(1), masks)


def check_arguments(count: int, size: int, noise: float) -> None:
    """Raise ValueError if images cannot be generated with these arguments."""
    if count < 1 or size < 16 or noise < 0:
        raise ValueError(
            f"count={count}, size={size}, noise={noise}; allowed: at least 1, 16 and 0"
        )


def draw_backgrounds(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Return dark images of random brightness, of shape (count, size, size)."""
    return uniform(0.0, 0.3, count, generator)[:, None, None].repeat(1, size, size)


def draw_objects(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw an object per image; return its pixels, bool of (N, size, size), and its class."""
    kind = torch.randint(CIRCLE, RECTANGLE + 1, (count,), generator=generator)
    # Half of height and width, as fractions of the image side.
    half = uniform(0.1, 0.2, (count, 2), generator)
    half[:, 1] = torch.where(kind == CIRCLE, half[:, 0], half[:, 1])
    center = half + (1 - 2 * half) * uniform(0.0, 1.0, (count, 2), generator)
    pixels = (torch.arange(size) + 0.5) / size
    rows = (pixels - center[:, :1]).div(half[:, :1]).abs()[:, :, None]
    columns = (pixels - center[:, 1:]).div(half[:, 1:]).abs()[:, None, :]
    circle = rows.square() + columns.square() <= 1
    rectangle = torch.maximum(rows, columns) <= 1
    return torch.where((kind == CIRCLE)[:, None, None], circle, rectangle), kind


def uniform(
    low: float, high: float, shape: int | tuple[int, ...], generator: torch.Generator
) -> Tensor:
    shape = (shape,) if isinstance(shape, int) else shape
    return low + (high - low) * torch.rand(shape, generator=generator)
