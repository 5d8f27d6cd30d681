"""Mean average precision of detected boxes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import detection

from app.runtime.extras import import_extra

Boxes = dict[str, Tensor]
PADDING = -1  # label where there is no box
SHOWN = {"": "map", "50": "map_50", "75": "map_75"}  # names of torchmetrics


class MeanAveragePrecision(detection.MeanAveragePrecision):
    """COCO's mean average precision, over IoU thresholds from 0.5 to 0.95, as a dict.

    The value of the key `""` is the mean over classes and thresholds; `50` and `75` are the means
    over classes at a threshold of 0.5 and 0.75; `per_class` has the mean over thresholds for each
    class, NaN for a class without boxes. A dataset without any box has the value NaN. Boxes that
    match a crowd count neither as right nor as wrong.

    Args:
        num_classes: Number of classes.
    """

    warn_on_many_detections = False

    def __init__(self, num_classes: int) -> None:
        import_extra("pycocotools", "detection")
        super().__init__(class_metrics=True)
        self.num_classes = num_classes

    def update(self, preds: Boxes, target: Boxes) -> None:  # type: ignore[override]
        """Add batches of boxes, with padding where labels are -1.

        Args:
            preds: `boxes` (N, D, 4), `labels` (N, D) and `scores` (N, D).
            target: `boxes` (N, M, 4), `labels` (N, M) and `crowd` (N, M).
        """
        found = _by_image(preds, {"boxes": "boxes", "labels": "labels", "scores": "scores"})
        true = _by_image(target, {"boxes": "boxes", "labels": "labels", "iscrowd": "crowd"})
        # Boxes with equal scores are ranked in the order of images, which depends on the ranks.
        order = sorted(range(len(found)), key=lambda i: (_content(true[i]), _content(found[i])))
        super().update([found[i] for i in order], [true[i] for i in order])

    def compute(self) -> dict[str, Tensor]:
        """Return the precisions."""
        values: dict[str, Any] = super().compute()
        per_class = torch.full((self.num_classes,), torch.nan)
        if any(map(len, self.groundtruth_labels)):  # otherwise there are no classes
            classes = values["classes"].reshape(-1).long()
            per_class[classes] = values["map_per_class"].reshape(-1).float()
        precisions = {key: values[name] for key, name in SHOWN.items()} | {"per_class": per_class}
        # torchmetrics has -1 in place of NaN
        return {key: value.where(value >= 0, torch.nan) for key, value in precisions.items()}


def _by_image(batch: Boxes, names: dict[str, str]) -> list[Boxes]:
    """Return the parts of a batch, by new names, for each image and without padding."""
    parts = {new: batch[name].cpu() for new, name in names.items()}
    is_box = parts["labels"] != PADDING
    return [{name: part[i][is_box[i]] for name, part in parts.items()} for i in range(len(is_box))]


def _content(boxes: Boxes) -> list[Any]:
    return [np.asarray(part).tolist() for part in boxes.values()]
