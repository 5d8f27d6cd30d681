"""Boxes of images: batches of fixed shape, joint transforms, and the way back to files.

A dataset of boxes has the attribute `has_boxes`, and samples of an image and these targets:

- `boxes`: float32 of shape (M, 4), as (x1, y1, x2, y2) in pixels of the image; M is the largest
  number of boxes that an image of the dataset has.
- `labels`: int64 of shape (M,); -1 where there is no box.
- `crowd`: bool of shape (M,): whether a box has several objects that are not told apart.
- `size`: int64 of shape (2,), height and width of the file.
- `frame`: float32 of shape (4,): where the pixels of the file are in the image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as v2

from app.data.augment import Augmentation
from app.data.batch import Inputs
from app.data.images import ImageFiles
from app.data.split import innermost
from app.runtime.errors import UserError
from app.runtime.nested import Key, Nested, pick, replace

Targets = dict[str, Tensor]
NO_BOX = -1  # label of padding
MIN_SIDE = 0.1  # pixels; what is left of a box that a transform has cut off is no box
BOX_SOURCES = ("app.data.coco.coco_folder", "app.data.boxed_shapes.boxed_shapes")


def pad_boxes(boxes: Tensor, labels: Tensor, crowd: Tensor, max_boxes: int) -> Targets:
    """Return boxes (K, 4), labels (K,) and crowd (K,) padded to `max_boxes`."""
    missing = max_boxes - len(boxes)
    return {
        "boxes": torch.cat([boxes.float(), boxes.new_zeros((missing, 4))]),
        "labels": torch.cat([labels, labels.new_full((missing,), NO_BOX)]),
        "crowd": torch.cat([crowd, crowd.new_zeros(missing)]),
    }


def make_targets(
    boxes: Tensor, labels: Tensor, crowd: Tensor, max_boxes: int, size: tuple[int, int]
) -> Targets:
    """Return the targets of an image of `size` (height, width) that is as large as its file."""
    height, width = size
    frame = torch.tensor([0, 0, width, height], dtype=torch.float32)
    return pad_boxes(boxes, labels, crowd, max_boxes) | {"size": torch.tensor(size), "frame": frame}


def has_boxes(dataset: Dataset[Any]) -> bool:
    """Return whether the targets of a dataset are boxes."""
    return bool(getattr(innermost(dataset), "has_boxes", False))


@dataclass(frozen=True)
class BoxTransform:
    """Applies the transforms of a stage to the image of a sample together with its boxes.

    Transforms are called with the image and a dict of `boxes` and `labels`, as those of
    torchvision, version 2, take them. Boxes that end up outside of the image are removed. Color
    augmentations of this program get the image alone.

    Attributes:
        transforms: Applied in order.
        inputs: Key of the image within a sample.
        targets: Key of the targets within a sample.
        is_training: Whether the images are only trained on; their `frame` is not kept up to date.
    """

    transforms: Sequence[Callable[..., Any]]
    inputs: Inputs
    targets: Key
    is_training: bool

    def __call__(self, sample: Nested) -> Nested:
        """Return the transformed sample.

        Raises:
            UserError: A transform cannot transform boxes.
        """
        assert isinstance(self.inputs, (int, str))
        assert isinstance(self.targets, (int, str))
        image, targets = pick(sample, self.inputs), pick(sample, self.targets)
        for transform in self.transforms:
            if isinstance(transform, Augmentation) and transform.keeps_masks:
                image = transform(image)
            else:
                image, targets = self._transform(transform, image, targets)
        return replace(replace(sample, self.inputs, image), self.targets, targets)

    def _transform(
        self, transform: Callable[..., Any], image: Tensor, targets: Targets
    ) -> tuple[Tensor, Targets]:
        is_box, max_boxes = targets["labels"] != NO_BOX, len(targets["labels"])
        indices = is_box.nonzero().flatten()  # survive where labels are filtered
        parts = {"boxes": _as_boxes(targets["boxes"][is_box], image), "labels": indices}
        if not self.is_training:  # torchvision's sanitizing expects as many boxes as labels
            parts["frame"] = _as_boxes(targets["frame"][None], image)
        try:
            image, moved = transform(tv_tensors.Image(image), parts)
            boxes = v2.clamp_bounding_boxes(moved["boxes"])
            boxes, is_kept = v2.sanitize_bounding_boxes(boxes, min_size=MIN_SIDE)
            kept = moved["labels"][is_kept]
        except (TypeError, ValueError, LookupError) as error:
            name = type(transform).__name__
            raise UserError(
                f"{name} cannot transform images together with boxes: {error}; allowed are "
                "transforms of torchvision.transforms.v2 that take boxes, functions of an image "
                "and a dict of boxes and labels that return both, and color augmentations"
            ) from error
        padded = pad_boxes(
            boxes.as_subclass(Tensor), targets["labels"][kept], targets["crowd"][kept], max_boxes
        )
        if not self.is_training:
            padded["frame"] = moved["frame"][0].as_subclass(Tensor)
        return image.as_subclass(Tensor), targets | padded


def _as_boxes(boxes: Tensor, image: Tensor) -> tv_tensors.BoundingBoxes:
    return tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=image.shape[-2:])


def check_augmentations(augmentations: Mapping[str, object]) -> None:
    """Check that augmentations of batches, which get no boxes, leave the pixels in their places.

    Raises:
        UserError: One may move pixels.
    """
    for name, augmentation in augmentations.items():
        if not getattr(augmentation, "keeps_masks", False):
            raise UserError(
                f"data.augment.{name} ({type(augmentation).__name__}) may move pixels, but not "
                "their boxes; allowed: color augmentations of app.data.augment. Put it under "
                "data.transforms.train, as a transform of torchvision.transforms.v2"
            )


def boxes_in_files(boxes: Tensor, size: Tensor, frame: Tensor) -> Tensor:
    """Return boxes of images in pixels of their files.

    Args:
        boxes: Shape (N, M, 4).
        size: Height and width of each file, of shape (N, 2).
        frame: Where the pixels of each file are in its image, of shape (N, 4).
    """
    corner, extent = frame[:, None, :2], frame[:, None, 2:] - frame[:, None, :2]
    scale = size.flip(1)[:, None] / extent
    points: Tensor = (boxes.unflatten(2, (2, 2)) - corner[:, None]) * scale[:, None]
    return points.clamp(min=0).minimum(size.flip(1)[:, None, None].to(points)).flatten(2)


class UnlabeledImages(Dataset[tuple[Tensor, Targets]]):
    """Image files as a dataset of boxes that has none."""

    has_boxes = True

    def __init__(self, files: ImageFiles) -> None:
        self.files, self.root, self.paths = files, files.root, files.paths

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Targets]:
        (image,) = self.files[index]
        height, width = image.shape[1:]
        empty = (
            torch.zeros(0, 4),
            torch.zeros(0, dtype=torch.int64),
            torch.zeros(0, dtype=torch.bool),
        )
        return image, make_targets(*empty, max_boxes=1, size=(height, width))
