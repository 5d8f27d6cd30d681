"""Overlaps and distances of label maps, from logits (N, C, ...) and labels (N, ...)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

Mask = NDArray[np.bool_]


class DiceScore(Metric):
    """Dice of each class over all pixels of the stage, twice the overlap by both areas.

    A class that occurs neither in targets nor in predictions has no Dice (NaN), and the mean
    leaves it out. Dice, "Measures of the Amount of Ecologic Association Between Species", 1945.

    Args:
        num_classes: The length C of the logits' second dimension.
        include_background: Whether class 0 counts.
        average: `macro` is the mean over the classes, `none` one value for each of them.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    overlap: Tensor
    areas: Tensor

    def __init__(
        self,
        num_classes: int,
        include_background: bool = False,
        average: Literal["macro", "none"] = "macro",
    ) -> None:
        super().__init__()
        if average not in ("macro", "none"):
            raise ValueError(f"average={average!r} is not known; allowed: macro, none")
        self.labels = labels_of(num_classes, include_background)
        self.num_classes = num_classes
        self.average = average
        self.add_state("overlap", torch.zeros(num_classes).long(), dist_reduce_fx="sum")
        self.add_state("areas", torch.zeros(num_classes).long(), dist_reduce_fx="sum")

    def update(self, output: Tensor, target: Tensor) -> None:
        """Logits of shape (N, C, ...), labels of shape (N, ...)."""
        overlap, areas = overlaps(output, target, self.num_classes)
        self.overlap += overlap.sum(dim=0)
        self.areas += areas.sum(dim=0)

    def compute(self) -> Tensor:
        """A scalar, or a vector of the classes from background or the first one on."""
        scores = (2 * self.overlap / self.areas)[self.labels.start :]
        return scores.nanmean() if self.average == "macro" else scores


class PartialDice(Metric):
    """The mean Dice of some classes only, over all pixels of the stage.

    Those among them that never occur are left out of the mean.

    Args:
        num_classes: The length C of the logits' second dimension.
        classes: The labels to be averaged, each from 0 to C - 1.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    overlap: Tensor
    areas: Tensor

    def __init__(self, num_classes: int, classes: Sequence[int]) -> None:
        super().__init__()
        allowed = labels_of(num_classes, include_background=True)
        self.classes = list(classes)
        if not self.classes or not set(self.classes) <= set(allowed):
            raise ValueError(
                f"classes={self.classes} must be at least one label from 0 to {num_classes - 1}"
            )
        self.num_classes = num_classes
        self.add_state("overlap", torch.zeros(num_classes).long(), dist_reduce_fx="sum")
        self.add_state("areas", torch.zeros(num_classes).long(), dist_reduce_fx="sum")

    def update(self, output: Tensor, target: Tensor) -> None:
        """Logits of shape (N, C, ...), labels of shape (N, ...)."""
        overlap, areas = overlaps(output, target, self.num_classes)
        self.overlap += overlap.sum(dim=0)
        self.areas += areas.sum(dim=0)

    def compute(self) -> Tensor:
        """A scalar."""
        return (2 * self.overlap / self.areas)[self.classes].nanmean()


class MeanIoU(Metric):
    """The mean over classes of their intersection over union of all pixels of the stage.

    Classes that occur neither in targets nor in predictions are left out. Jaccard, "The
    Distribution of the Flora in the Alpine Zone", 1912.

    Args:
        num_classes: The length C of the logits' second dimension.
        include_background: Whether class 0 counts.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    overlap: Tensor
    union: Tensor

    def __init__(self, num_classes: int, include_background: bool = True) -> None:
        super().__init__()
        self.labels = labels_of(num_classes, include_background)
        self.num_classes = num_classes
        self.add_state("overlap", torch.zeros(num_classes).long(), dist_reduce_fx="sum")
        self.add_state("union", torch.zeros(num_classes).long(), dist_reduce_fx="sum")

    def update(self, output: Tensor, target: Tensor) -> None:
        """Logits of shape (N, C, ...), labels of shape (N, ...)."""
        overlap, areas = overlaps(output, target, self.num_classes)
        self.overlap += overlap.sum(dim=0)
        self.union += (areas - overlap).sum(dim=0)

    def compute(self) -> Tensor:
        """A scalar."""
        return (self.overlap / self.union)[self.labels.start :].nanmean()


class InstanceIoU(Metric):
    """The mean over images of each image's mean intersection over union.

    In each image the classes that occur in its target or its prediction are averaged; an image
    in which none of them occurs is left out.

    Args:
        num_classes: The length C of the logits' second dimension.
        include_background: Whether class 0 counts.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, num_classes: int, include_background: bool = True) -> None:
        super().__init__()
        self.labels = labels_of(num_classes, include_background)
        self.num_classes = num_classes
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, output: Tensor, target: Tensor) -> None:
        """Logits of shape (N, C, ...), labels of shape (N, ...)."""
        overlap, areas = overlaps(output, target, self.num_classes)
        of_images = (overlap / (areas - overlap))[:, self.labels.start :].nanmean(dim=1)
        self.total += of_images.nansum()
        self.count += (~of_images.isnan()).sum()

    def compute(self) -> Tensor:
        """A scalar."""
        return self.total / self.count


class HausdorffDistance95(Metric):
    """How far the outlines of target and prediction lie apart, in pixels.

    The larger of both directions' percentiles of the distances from the edge pixels of one to
    the nearest edge pixel of the other; its mean over the images and classes where the class
    occurs in both. An edge pixel has a neighbour, across a side, that is not of its class or lies
    outside of the image. Label maps are kept on the device, one byte a pixel, until `compute`.
    Huttenlocher et al., "Comparing Images Using the Hausdorff Distance", 1993.

    Args:
        num_classes: The length C of the logits' second dimension.
        include_background: Whether class 0 counts.
        percentile: Above 0 and at most 100, which is the plain Hausdorff distance.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    collects_in_update = True
    outputs: list[Tensor]
    targets: list[Tensor]

    def __init__(
        self, num_classes: int, include_background: bool = False, percentile: float = 95.0
    ) -> None:
        super().__init__()
        if importlib.util.find_spec("scipy") is None:
            raise ValueError('scipy is not installed; pip install -e ".[segmentation]"')
        if not 0 < percentile <= 100:
            raise ValueError(f"percentile={percentile!r} must be above 0 and at most 100")
        self.labels = labels_of(num_classes, include_background)
        self.num_classes = num_classes
        self.percentile = percentile
        self.dtype_of_labels = torch.uint8 if num_classes <= 256 else torch.int16
        self.add_state("outputs", [], dist_reduce_fx="cat")
        self.add_state("targets", [], dist_reduce_fx="cat")

    def update(self, output: Tensor, target: Tensor) -> None:
        """Logits of shape (N, C, H, W) or (N, C, D, H, W), labels without their C."""
        check_classes(output, self.num_classes)
        self.outputs.append(output.argmax(dim=1).to(self.dtype_of_labels))
        self.targets.append(target.to(self.dtype_of_labels))

    def compute(self) -> Tensor:
        """A scalar in pixels; NaN where no class occurs in both maps of an image."""
        outputs, targets = (dim_zero_cat(s).cpu().numpy() for s in (self.outputs, self.targets))
        distances = [
            edge_distance(output == label, target == label, self.percentile)
            for output, target in zip(outputs, targets, strict=True)
            for label in self.labels
            if (output == label).any() and (target == label).any()
        ]
        return torch.tensor(distances, device=self.device).mean()


def overlaps(output: Tensor, target: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Pixels of each image and class, both (N, C): those in both maps, the sum of those in each."""
    check_classes(output, num_classes)
    classes = torch.arange(num_classes, device=output.device)[:, None]
    predicted = output.argmax(dim=1).reshape(len(output), 1, -1) == classes
    actual = target.reshape(len(target), 1, -1) == classes
    return (predicted & actual).sum(dim=2), predicted.sum(dim=2) + actual.sum(dim=2)


def edge_distance(output: Mask, target: Mask, percentile: float) -> float:
    """The larger of both directed distances between the edges of two masks that are not empty."""
    from scipy import ndimage

    # Outside of the box that holds both masks there is no edge.
    (box,) = ndimage.find_objects((output | target).astype(np.uint8))
    edges = [mask[box] & ~ndimage.binary_erosion(mask[box]) for mask in (output, target)]
    return max(
        float(np.percentile(ndimage.distance_transform_edt(~there)[here], percentile))
        for here, there in (edges, reversed(edges))
    )


def labels_of(num_classes: int, include_background: bool) -> range:
    """The labels that count."""
    first = 0 if include_background else 1
    if num_classes <= first:
        raise ValueError(f"num_classes={num_classes!r} is too few; give at least {first + 1}")
    return range(first, num_classes)


def check_classes(output: Tensor, num_classes: int) -> None:
    """Refuses logits of another number of classes."""
    if output.ndim < 2 or output.shape[1] != num_classes:
        raise ValueError(
            f"num_classes={num_classes} does not fit outputs of shape {tuple(output.shape)}; "
            f"wanted: (N, {num_classes}, ...)"
        )
