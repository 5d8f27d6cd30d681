"""Segmentation metrics, from logits of shape (N, C, ...) and labels of shape (N, ...).

For C = 1 the logits are those of a sigmoid, as for `app.losses.dice.DiceLoss`: the labels are 1
where they are above 0, and 0 elsewhere. Only the class of label 1 is measured.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from app.metrics.function import SampleMean, predicted_labels
from app.runtime.extras import import_extra

Mask = NDArray[np.bool_]
Average = Literal["macro", "none"]


class OverlapMetric(Metric):
    """Base of metrics of the overlap of each class, counted over all pixels of the stage.

    A class that occurs neither in targets nor in predictions has the score NaN, and means exclude
    it.

    Args:
        num_classes: Number of classes C.
        labels: Labels of the classes to include.
        ignore_index: Label of pixels that are not counted, in the prediction either; None counts
            all.
    """

    higher_is_better = True
    full_state_update = False
    overlap: Tensor
    areas: Tensor

    def __init__(
        self, num_classes: int, labels: Sequence[int], ignore_index: int | None = None
    ) -> None:
        super().__init__()
        self.num_classes, self.labels = num_classes, list(labels)
        self.ignore_index = ignore_index
        zeros = torch.zeros(count_labels(num_classes)).long()
        self.add_state("overlap", zeros, dist_reduce_fx="sum")
        self.add_state("areas", zeros.clone(), dist_reduce_fx="sum")

    def update(self, output: Tensor, target: Tensor) -> None:
        """Add logits of shape (N, C, ...) and labels of shape (N, ...)."""
        overlap, areas = count_overlaps(output, target, self.num_classes, self.ignore_index)
        self.overlap += overlap.sum(dim=0)
        self.areas += areas.sum(dim=0)

    @property
    def update_key(self) -> tuple[object, ...]:
        """Equal for metrics whose updates add the same, so that a step updates one of them."""
        return OverlapMetric, self.num_classes, self.ignore_index

    def dice_scores(self) -> Tensor:
        """Return the Dice score of each included class."""
        return (2 * self.overlap / self.areas)[self.labels]


class MeanOverlap(OverlapMetric):
    """Base of scores of each class over all pixels of the stage, and of their mean.

    Args:
        num_classes: Number of classes C.
        include_background: Whether to include class 0; None does as `with_background` says. Ignored
            if there is a single class.
        average: `macro` returns the mean over the classes, `none` one value per class.
        ignore_index: Label of pixels that are not counted; None counts all.
    """

    with_background: ClassVar[bool]

    def __init__(
        self,
        num_classes: int,
        include_background: bool | None = None,
        average: Average = "macro",
        ignore_index: int | None = None,
    ) -> None:
        if include_background is None:
            include_background = self.with_background
        labels = included_labels(num_classes, include_background)
        super().__init__(num_classes, labels, ignore_index)
        self.average = check_average(average)

    def compute(self) -> Tensor:
        """Return a scalar, or with `average="none"` a vector over the included classes."""
        scores = self.class_scores()
        return scores.nanmean() if self.average == "macro" else scores

    @abstractmethod
    def class_scores(self) -> Tensor:
        """Return the score of each included class."""


class DiceScore(MeanOverlap):
    """Dice score of each class, by default without class 0: twice the overlap by both areas.

    Dice, "Measures of the Amount of Ecologic Association Between Species", 1945.
    """

    with_background = False

    def class_scores(self) -> Tensor:
        return self.dice_scores()


class MeanIoU(MeanOverlap):
    """Intersection over union of each class, by default with class 0.

    Jaccard, "The Distribution of the Flora in the Alpine Zone", 1912.
    """

    with_background = True

    def class_scores(self) -> Tensor:
        return (self.overlap / (self.areas - self.overlap))[self.labels]


class PartialDice(OverlapMetric):
    """Mean Dice score of selected classes over all pixels of the stage.

    Args:
        num_classes: Number of classes C.
        classes: Labels to average over, each from 0 to C - 1; 1 if C is 1.
        ignore_index: Label of pixels that are not counted; None counts all.
    """

    def __init__(
        self, num_classes: int, classes: Sequence[int], ignore_index: int | None = None
    ) -> None:
        allowed = included_labels(num_classes, include_background=True)
        if not classes or not set(classes) <= set(allowed):
            raise ValueError(
                f"classes={list(classes)} must be at least one label from {allowed[0]} to "
                f"{allowed[-1]}"
            )
        super().__init__(num_classes, classes, ignore_index)

    def compute(self) -> Tensor:
        return self.dice_scores().nanmean()


class InstanceIoU(SampleMean):
    """Mean over images of the mean intersection over union of each image.

    The mean of an image is over the classes that occur in its target or its prediction; images
    without any such class are excluded.

    Args:
        num_classes: Number of classes C.
        include_background: Whether to include class 0.
        ignore_index: Label of pixels that are not counted; None counts all.
    """

    higher_is_better = True

    def __init__(
        self, num_classes: int, include_background: bool = True, ignore_index: int | None = None
    ) -> None:
        super().__init__()
        self.labels = included_labels(num_classes, include_background)
        self.num_classes, self.ignore_index = num_classes, ignore_index

    def update(self, output: Tensor, target: Tensor) -> None:
        """Add logits of shape (N, C, ...) and labels of shape (N, ...)."""
        overlap, areas = count_overlaps(output, target, self.num_classes, self.ignore_index)
        image_scores = (overlap / (areas - overlap))[:, self.labels.start :].nanmean(dim=1)
        self.total += image_scores.nansum()
        self.count += (~image_scores.isnan()).sum()


class HausdorffDistance95(Metric):
    """Percentile of the Hausdorff distance between the edges of target and prediction, in pixels.

    For each direction, take the percentile of the distances from the edge pixels of one mask to the
    nearest edge pixel of the other; the larger of both is averaged over the images and classes in
    which the class occurs in target and prediction. An edge pixel has a face neighbor that is of
    another class or outside of the image. Label maps are kept on the device until `compute`, with
    one byte per pixel for up to 255 classes. Huttenlocher et al., "Comparing Images Using the
    Hausdorff Distance", 1993.

    Args:
        num_classes: Number of classes C.
        include_background: Whether to include class 0.
        percentile: Percentile, above 0 and at most 100, which is the plain Hausdorff distance.
        ignore_index: Label of pixels that are of no class in both maps; None if there are none.
    """

    higher_is_better = False
    full_state_update = False
    collects_in_update = True
    outputs: list[Tensor]
    targets: list[Tensor]

    def __init__(
        self,
        num_classes: int,
        include_background: bool = False,
        percentile: float = 95.0,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        import_extra("scipy", "segmentation")
        if not 0 < percentile <= 100:
            raise ValueError(f"percentile={percentile!r} must be above 0 and at most 100")
        self.labels = included_labels(num_classes, include_background)
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.percentile = percentile
        self.label_dtype = torch.uint8 if num_classes < 256 else torch.int16
        self.add_state("outputs", [], dist_reduce_fx="cat")
        self.add_state("targets", [], dist_reduce_fx="cat")

    def update(self, output: Tensor, target: Tensor) -> None:
        """Add logits (N, C, H, W) or (N, C, D, H, W) and labels (N, H, W) or (N, D, H, W)."""
        check_num_classes(output, self.num_classes)
        labels = predicted_labels(output)
        target = target.reshape(labels.shape)
        if self.ignore_index is not None:
            is_ignored = target == self.ignore_index
            no_class = count_labels(self.num_classes)
            labels, target = (x.masked_fill(is_ignored, no_class) for x in (labels, target))
        self.outputs.append(labels.to(self.label_dtype))
        self.targets.append(target.to(self.label_dtype))

    def compute(self) -> Tensor:
        """Return a scalar; NaN if no class occurs in both maps of any image."""
        outputs, targets = (dim_zero_cat(s).cpu().numpy() for s in (self.outputs, self.targets))
        distances = [
            edge_distance(output == label, target == label, self.percentile)
            for output, target in zip(outputs, targets, strict=True)
            for label in self.labels
            if (output == label).any() and (target == label).any()
        ]
        return torch.tensor(distances, device=self.device).mean()


def count_overlaps(
    output: Tensor, target: Tensor, num_classes: int, ignore_index: int | None = None
) -> tuple[Tensor, Tensor]:
    """Count the pixels of each image and class, except where the target is `ignore_index`.

    Returns:
        The number of pixels in both maps, and the sum of the numbers in each map, both of shape
        (N, C), or (N, 2) for the labels 0 and 1 if C is 1.
    """
    check_num_classes(output, num_classes)
    classes = torch.arange(count_labels(num_classes), device=output.device)[:, None]
    target = target.reshape(len(target), 1, -1)
    predicted = predicted_labels(output).reshape(len(output), 1, -1) == classes
    actual = target == classes
    if ignore_index is not None:
        is_counted = target != ignore_index
        predicted, actual = predicted & is_counted, actual & is_counted
    return (predicted & actual).sum(dim=2), predicted.sum(dim=2) + actual.sum(dim=2)


def edge_distance(output: Mask, target: Mask, percentile: float) -> float:
    """Return the larger of both directed distances between the edges of two non-empty masks."""
    from scipy import ndimage

    # Crop to the bounding box of both masks: there are no edges outside of it.
    (box,) = ndimage.find_objects((output | target).astype(np.uint8))
    edges = [mask[box] & ~ndimage.binary_erosion(mask[box]) for mask in (output, target)]
    return max(
        float(np.percentile(ndimage.distance_transform_edt(~other)[edge], percentile))
        for edge, other in (edges, reversed(edges))
    )


def check_average(average: Average) -> Average:
    """Return how a metric averages over classes.

    Raises:
        ValueError: There is no such average.
    """
    if average not in get_args(Average):
        raise ValueError(f"average={average!r} is not valid; allowed: macro, none")
    return average


def included_labels(num_classes: int, include_background: bool) -> range:
    """Return the labels that a metric includes: of a single class, label 1."""
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes!r} must be at least 1")
    first = 0 if include_background and num_classes > 1 else 1
    return range(first, count_labels(num_classes))


def count_labels(num_classes: int) -> int:
    """Return the number of labels in a target: two if the only class is there or not."""
    return max(num_classes, 2)


def check_num_classes(output: Tensor, num_classes: int) -> None:
    """Check the number of classes of logits.

    Raises:
        ValueError: The logits have another number of classes.
    """
    if output.ndim < 2 or output.shape[1] != num_classes:
        raise ValueError(
            f"num_classes={num_classes} does not fit outputs of shape {tuple(output.shape)}; "
            f"expected: (N, {num_classes}, ...)"
        )
