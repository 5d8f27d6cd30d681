"""What a batch means: forward, losses, metrics, learning. Users subclass this."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from app.data.loaders import Batch
from app.device import Precision
from app.losses.term import WeightedSum
from app.metrics.measure import StageMetrics
from app.optimization import Optimization
from app.records import StepValues, mean_of


class SupervisedTask:
    """Learns targets from inputs.

    Args:
        model: From inputs to outputs.
        loss: From outputs and targets to the total and its terms.
        metrics: By stage.
        precision: Of the forward pass.
        optimization: None where nothing is learned.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: WeightedSum,
        metrics: Mapping[str, StageMetrics],
        precision: Precision,
        optimization: Optimization | None = None,
    ) -> None:
        self.model, self.loss, self.metrics = model, loss, metrics
        self.precision, self.optimization = precision, optimization

    def train_step(self, batch: Batch) -> StepValues:
        """Learns from one batch; what it returns stays on the device."""
        assert self.optimization is not None
        inputs, targets = batch
        with self.precision.autocast():
            outputs = self.model(inputs)
            total, terms = self.loss(outputs, targets)
        self.optimization.step(total, len(targets))
        return self.measure("train", outputs.detach(), targets, total, terms)

    @torch.no_grad()
    def eval_step(self, stage: str, batch: Batch) -> StepValues:
        """Measures one batch; what it returns stays on the device."""
        inputs, targets = batch
        with self.precision.autocast():
            outputs = self.model(inputs)
            total, terms = self.loss(outputs, targets)
        return self.measure(stage, outputs, targets, total, terms)

    def measure(
        self, stage: str, outputs: Tensor, targets: Tensor, total: Tensor, terms: dict[str, Tensor]
    ) -> StepValues:
        """The row of a step: the loss, its terms, what it adds to each metric."""
        count = len(targets)
        means = {name: mean_of(value, count) for name, value in {"loss": total, **terms}.items()}
        return {**means, **self.metrics[stage].sums(outputs, targets)}
