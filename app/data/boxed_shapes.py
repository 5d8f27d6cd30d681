"""Synthetic detection data: circles and rectangles on a noisy background, each with its box."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import masks_to_boxes

from app.data.boxes import Targets, make_targets
from app.data.shapes import (
    CIRCLE,
    MAX_OBJECTS,
    check_arguments,
    draw_backgrounds,
    draw_objects,
    uniform,
)

MIN_VISIBLE = 0.5  # part of an object; one that others hide more than that has no box


class BoxedShapes(Dataset[tuple[Tensor, Targets]]):
    """Images in memory with boxes; a sample is (uint8 of shape (1, size, size), targets).

    Args:
        images: Shape (N, 1, size, size).
        boxes: Boxes of each image, of shape (K, 4).
        labels: Labels of each image, of shape (K,).
    """

    has_boxes = True

    def __init__(self, images: Tensor, boxes: list[Tensor], labels: list[Tensor]) -> None:
        self.images, self.boxes, self.labels = images, boxes, labels
        self.classes = ["circle", "rectangle"]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Targets]:
        image, labels = self.images[index], self.labels[index]
        crowd = torch.zeros(len(labels), dtype=torch.bool)
        size = (image.shape[1], image.shape[2])
        return image, make_targets(self.boxes[index], labels, crowd, MAX_OBJECTS, size)

    def fingerprint(self) -> str:
        """Return what tells these images from others."""
        return f"{len(self)} {self.images.sum().item()}"


def boxed_shapes(count: int, size: int = 96, seed: int = 0, noise: float = 0.1) -> BoxedShapes:
    """Generate images with up to four circles and rectangles of random place, size and brightness.

    Args:
        count: Number of images.
        size: Height and width in pixels.
        seed: The same seed gives the same data.
        noise: Standard deviation of the noise added to every pixel, of which 1 is white.

    Raises:
        ValueError: The count is below 1, the size below 16, or the noise negative.
    """
    check_arguments(count, size, noise)
    generator = torch.Generator().manual_seed(seed)
    images = draw_backgrounds(count, size, generator)
    numbers = torch.randint(1, MAX_OBJECTS + 1, (count,), generator=generator)
    owner = torch.full((count, size, size), -1)  # number of the object that a pixel shows
    drawn, kinds = [], []
    for index in range(MAX_OBJECTS):
        inside, kind = draw_objects(count, size, generator)
        inside &= (index < numbers)[:, None, None]
        brightness = uniform(0.5, 1.0, count, generator)[:, None, None]
        images = torch.where(inside, brightness, images)
        owner[inside] = index
        drawn.append(inside)
        kinds.append(kind - CIRCLE)
    images += noise * torch.randn(images.shape, generator=generator)
    pixels = images.clamp_(0, 1).mul_(255).round_().to(torch.uint8)[:, None]
    found = [
        _visible_objects(owner[i], torch.stack(drawn, 1)[i], torch.stack(kinds, 1)[i])
        for i in range(count)
    ]
    return BoxedShapes(pixels, [boxes for boxes, _ in found], [labels for _, labels in found])


def _visible_objects(owner: Tensor, drawn: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
    """Return boxes (K, 4) and labels (K,) of the objects of an image that can be seen.

    Args:
        owner: Number of the object that each pixel shows, of shape (size, size).
        drawn: All pixels of each object, bool of shape (objects, size, size).
        kinds: Label of each object.
    """
    shown = owner == torch.arange(len(drawn))[:, None, None]
    area = drawn.sum((1, 2))
    is_visible = (area > 0) & (shown.sum((1, 2)) >= MIN_VISIBLE * area)
    boxes = masks_to_boxes(drawn[is_visible])  # from the first to the last pixel
    boxes[:, 2:] += 1
    return boxes, kinds[is_visible]
