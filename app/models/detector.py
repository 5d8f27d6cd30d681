"""Detectors of torchvision with inputs, targets and outputs that are batches of fixed shape."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d

Boxes = dict[str, Tensor]
PADDING = -1  # label where there is no box
MAX_DETECTIONS = 100  # per image, as many as COCO's metric takes


class Detector(nn.Module):
    """A detector of torchvision that takes images of equal size as they are.

    torchvision's own resizing and normalization, which the data do here, are taken out.

    Args:
        model: Detector of `torchvision.models.detection`.
        first_label: Label of the first class in it: 1 if 0 is the background.
    """

    def __init__(self, model: nn.Module, first_label: int) -> None:
        super().__init__()
        model.transform = _KeepImages()
        self.model, self.first_label = model, first_label

    def forward(self, images: Tensor, targets: Boxes | None = None) -> Boxes:
        """Return losses by name in training mode, else the boxes with the highest scores.

        Args:
            images: Shape (N, C, H, W).
            targets: Needed in training mode: `boxes` (N, M, 4) as (x1, y1, x2, y2) in pixels,
                `labels` (N, M), -1 where there is no box, and `crowd` (N, M), the boxes to ignore.

        Returns:
            Scalar losses; or `boxes` (N, 100, 4), `labels` (N, 100), -1 where there is no box,
            and `scores` (N, 100), from the highest to the lowest.
        """
        if self.training:
            assert targets is not None
            losses: Boxes = self.model([*images], self._unpad(targets))
            return losses
        found = [self._pad(boxes) for boxes in self.model([*images])]
        return {name: torch.stack([boxes[name] for boxes in found]) for name in found[0]}

    def _unpad(self, targets: Boxes) -> list[Boxes]:
        keep = (targets["labels"] != PADDING) & ~targets["crowd"]
        return [
            {"boxes": boxes[kept], "labels": labels[kept] + self.first_label}
            for boxes, labels, kept in zip(targets["boxes"], targets["labels"], keep, strict=True)
        ]

    def _pad(self, boxes: Boxes) -> Boxes:
        missing = max(0, MAX_DETECTIONS - len(boxes["labels"]))
        labels = boxes["labels"][:MAX_DETECTIONS] - self.first_label
        return {
            "boxes": pad(boxes["boxes"][:MAX_DETECTIONS], (0, 0, 0, missing)),
            "labels": pad(labels, (0, missing), value=PADDING),
            "scores": pad(boxes["scores"][:MAX_DETECTIONS], (0, missing)),
        }


class _KeepImages(nn.Module):
    """Replaces torchvision's `GeneralizedRCNNTransform`; neither resizes nor normalizes."""

    def forward(
        self, images: list[Tensor], targets: list[Boxes] | None
    ) -> tuple[ImageList, list[Boxes] | None]:
        return ImageList(torch.stack(images), [tuple(image.shape[1:]) for image in images]), targets

    def postprocess(self, found: list[Boxes], *sizes: Any) -> list[Boxes]:  # noqa: ARG002
        """Return the boxes as they are, since images keep their sizes."""
        return found


def freeze_batchnorm(model: nn.Module, eps: float | None = None) -> None:
    """Replace batch norms by torchvision's frozen ones, with the same statistics, in place.

    Batches of detectors are too small to estimate statistics.

    Args:
        model: Module with batch norms.
        eps: Their new `eps`; None keeps it.
    """
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(layer.num_features, layer.eps if eps is None else eps)
            frozen.load_state_dict(layer.state_dict())
            model.set_submodule(name, frozen)
