"""Collect the first samples of a stage and turn them into images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from app.callbacks.overlays import box_colors, draw_boxes, legend_of, overlay
from app.callbacks.prediction_files import (
    class_colors,
    flatten_outputs,
    is_detections,
    labeled,
    output_name,
)
from app.callbacks.selection import class_label, configured_logit_outputs, pick_targets
from app.runtime.nested import Nested, map_tensors, pick
from app.training.events import StepEnd

NamedTensors = dict[str, Tensor]  # keyed by the names that `flatten_outputs` gives
MIN_SCORE = 0.5  # of detected boxes that are drawn


class SampleBuffer:
    """The first samples of a stage, kept on their device until they are needed.

    Args:
        config: The configuration, which tells which parts of a batch are inputs and targets and
            which outputs are class logits.
        count: Number of samples to keep.
    """

    def __init__(self, config: dict[str, Any], count: int) -> None:
        self.config, self.num_missing = config, count
        self.batches: list[tuple[Nested, Nested, Nested]] = []

    def add(self, step: StepEnd) -> None:
        """Keep as many samples of the batch as are still missing."""
        if self.num_missing > 0:
            inputs = pick(step.batch, self.config["data"]["inputs"])
            parts = (inputs, step.outputs, pick_targets(step.batch, self.config))
            self.batches.append(map_tensors(self._copy_missing, parts))
            self.num_missing -= step.num_samples

    def _copy_missing(self, tensor: Tensor) -> Tensor:
        # A view would keep the memory of the whole batch alive.
        return tensor[: self.num_missing].detach().clone() if tensor.ndim else tensor

    @property
    def is_empty(self) -> bool:
        return not self.batches

    @cached_property
    def logit_names(self) -> set[str]:
        """Names of the outputs that are class logits."""
        return {output_name(key) for key in configured_logit_outputs(self.config)}

    def named_tensors(self) -> tuple[NamedTensors, NamedTensors, NamedTensors]:
        """Return inputs, outputs and targets by name, on the CPU."""
        inputs, outputs, targets = (_concat(parts) for parts in zip(*self.batches, strict=True))
        return inputs, outputs, targets

    def image_rows(self) -> dict[str, Tensor]:
        """Return everything that can be shown as images, each (N, 3, height, width) in [0, 1].

        Returns:
            Rows named `image`, `target` (label maps over the image, or images) and `prediction`
            (label maps over the image, or outputs that are images), followed by `_<name>` if there
            are several of a kind; or with boxes over the image. Empty if no input is an image.
        """
        inputs, outputs, targets = self.named_tensors()
        shown = {name: normalize_images(x) for name, x in inputs.items() if x.ndim == 4}
        if not shown:
            return {}
        if is_detections(outputs):
            return self._box_rows(next(iter(shown.values())), outputs, targets)
        dense = {name: o for name, o in outputs.items() if o.ndim == 4}
        logits = {name: o for name, o in dense.items() if name in self.logit_names}
        images = {n: o for n, o in dense.items() if n not in logits and o.shape[1] in (1, 3)}
        colors, first = self.colors(logits), next(iter(shown.values()))
        rows = {labeled("image", name): x for name, x in shown.items()}
        for name, target in targets.items():
            if logits and _is_label_map(target):
                labels = target.squeeze(1) if target.ndim == 4 else target
                rows[labeled("target", name)] = overlay(first, labels, colors)
            elif images and target.ndim == 4 and target.shape[1] in (1, 3):
                rows[labeled("target", name)] = normalize_images(target)
        for name, output in logits.items():
            rows[labeled("prediction", name)] = overlay(first, predicted_labels(output), colors)
        for name, output in images.items():
            rows[labeled("prediction", name)] = normalize_images(output)
        return rows

    def _box_rows(
        self, images: Tensor, outputs: NamedTensors, targets: NamedTensors
    ) -> dict[str, Tensor]:
        colors = box_colors(self.config["data"]["num_classes"])
        labels = outputs["labels"].where(outputs["scores"] >= MIN_SCORE, -1)
        return {
            "target": draw_boxes(images, targets["boxes"], targets["labels"], colors),
            "prediction": draw_boxes(images, outputs["boxes"], labels, colors),
        }

    def legend(self) -> dict[str, tuple[int, ...]]:
        """Return the color of each class by its name; empty without label maps and boxes."""
        _, outputs, _ = self.named_tensors()
        if is_detections(outputs):
            return legend_of(self.config, box_colors(self.config["data"]["num_classes"]))
        logits = {n: o for n, o in outputs.items() if o.ndim == 4 and n in self.logit_names}
        return legend_of(self.config, self.colors(logits)) if logits else {}

    def colors(self, logits: NamedTensors) -> np.ndarray:
        """Return the color of each class of dense logits (N, K, height, width)."""
        return class_colors(
            self.config["data"].get("colors"), max((2, *(o.shape[1] for o in logits.values())))
        )

    def titles(self) -> list[str]:
        """Return "predicted / true" classes per sample; empty if there are no (N, K) logits."""
        _, outputs, targets = self.named_tensors()
        logits = [o for name, o in outputs.items() if name in self.logit_names and o.ndim == 2]
        labels = [t for t in targets.values() if t.ndim == 1 and not t.is_floating_point()]
        if not logits:
            return []
        classes = logits[0].shape[1]
        predicted = [self._name(label, classes) for label in logits[0].argmax(1).tolist()]
        true = [self._name(label, classes) for label in labels[0].tolist()] if labels else []
        return [
            f"{p} / {t}" for p, t in zip(predicted, true or ["?"] * len(predicted), strict=True)
        ]

    def _name(self, label: int, count: int) -> str:
        names = self.config["data"].get("class_names") or []
        return class_label(self.config, label) if len(names) == count else str(label)


def normalize_images(images: Tensor) -> Tensor:
    """Scale images so that the minimum is black and the maximum white.

    Of images with other than 1 or 3 channels, only the first channel is shown.
    """
    shown = (images if images.shape[1] in (1, 3) else images[:, :1]).float().nan_to_num()
    low, high = shown.amin(), shown.amax()
    return ((shown - low) / (high - low).clamp(min=1e-12)).expand(-1, 3, -1, -1)


def predicted_labels(logits: Tensor) -> Tensor:
    """Return the class of each pixel, from logits (N, K, height, width); K of 1 is binary."""
    return logits.argmax(1) if logits.shape[1] > 1 else (logits[:, 0] > 0).long()


def _concat(parts: Sequence[Nested]) -> NamedTensors:
    if parts[0] is None:
        return {}
    batches = [dict(flatten_outputs(part)) for part in parts]
    return {
        name: torch.cat([batch[name] for batch in batches]).cpu()
        for name, tensor in batches[0].items()
        if tensor.ndim
    }


def _is_label_map(target: Tensor) -> bool:
    has_one_channel = target.ndim == 3 or (target.ndim == 4 and target.shape[1] == 1)
    return has_one_channel and not target.is_floating_point()
