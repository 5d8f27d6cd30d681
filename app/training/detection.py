"""Training of detectors, which compute their losses themselves."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from app.runtime.errors import UserError, did_you_mean, join_choices
from app.runtime.nested import Nested, pick
from app.training.precision import Precision
from app.training.step_values import average
from app.training.task import MetricsLike, StepOutput, Task


class DetectionTask(Task):
    """Trains a detector on images and boxes, as `app.models.detector.Detector` takes them.

    The loss is the weighted sum of the losses that the model returns in training mode, and each
    of these is a column. In evaluation mode it returns boxes, and no losses: the loss of the
    stages `valid` and `test` is NaN, an empty cell in the tables.

    Args:
        model: Returns losses by name in training mode, from images and targets, and `boxes`,
            `labels` and `scores` in evaluation mode, from images.
        metrics: Metrics by name for the stages `valid` and `test`.
        precision: Precision of the forward pass; None is fp32.
        inputs: Key of the images in a batch.
        targets: Key of the targets in a batch.
        loss_weights: Weights of losses by name; 1 for all others.

    Raises:
        ValueError: If there are metrics for the stage `train`, in which the model returns no boxes.
    """

    has_eval_loss = False

    def __init__(
        self,
        model: nn.Module,
        metrics: Mapping[str, MetricsLike] | None = None,
        precision: Precision | None = None,
        inputs: int | str = 0,
        targets: int | str = 1,
        loss_weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(model, metrics, precision)
        if self.metrics["train"].output_metrics:
            names = join_choices(self.metrics["train"].output_metrics)
            raise ValueError(
                f"metric.train has {names}, but a detector returns losses in training, and no "
                "boxes; allowed: metric.train={}"
            )
        self.inputs, self.targets = inputs, targets
        self.loss_weights = dict(loss_weights or {})

    def train_step(self, batch: Nested) -> StepOutput:
        images, targets = pick(batch, self.inputs), pick(batch, self.targets)
        losses = self.forward_model(images, targets)
        for name in self.loss_weights:
            if name not in losses:
                raise UserError(
                    f"task.loss_weights.{name} is not a loss of the model; it has: "
                    f"{join_choices(losses)}{did_you_mean(name, losses)}"
                )
        terms = [self.loss_weights.get(name, 1.0) * loss for name, loss in losses.items()]
        total = torch.stack(terms).sum()
        self.optimizer.step(total, len(images))
        columns = {"loss": total} | losses
        return StepOutput({name: average(loss, len(images)) for name, loss in columns.items()})

    def eval_step(self, stage: str, batch: Nested) -> StepOutput:
        images, targets = pick(batch, self.inputs), pick(batch, self.targets)
        no_loss = torch.full((), torch.nan, device=images.device)
        return self.step_output(stage, self.model(images), targets, no_loss)

    def predict_step(self, batch: Nested) -> Nested:
        return self.model(pick(batch, self.inputs))
