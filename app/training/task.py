"""What a batch means: forward, losses, metrics, learning. Users subclass this."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from app.metrics.output_metric import OutputMetric
from app.metrics.stage_metrics import StageMetrics, as_metrics
from app.runtime.errors import UserError
from app.runtime.nested import Nested, count_samples, describe, map_tensors
from app.training.accumulator import Average, StepValues, average
from app.training.optim.optim_wrapper import OptimWrapper, OptimWrapperDict
from app.training.precision import Precision

Forward = Callable[[Nested], Nested]
MetricsLike = StageMetrics | Mapping[str, Metric | OutputMetric | Callable[..., Tensor]]


@dataclass(frozen=True)
class StepOutput:
    """What a step gives back; everything stays on the device.

    Attributes:
        values: The row of the step: the loss and whatever else is to be a column.
        outputs: What the model gave, for those who watch.
        numbers: Further columns, known to the host.
    """

    values: StepValues
    outputs: Nested = None
    host_values: Mapping[str, float] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        """Over which the loss is the mean."""
        loss = self.values["loss"]
        assert isinstance(loss, Average), "a loss is a mean over samples: mean_of(loss, count)"
        return loss.count


class Task:
    """What the loop needs; a task from scratch answers at least `train_step` or `eval_step`.

    The loop calls the steps inside the autocast of the precision, the model in the right mode,
    `eval_step` and `predict_step` without gradients.

    Args:
        model: All modules that learn, as one.
        metrics: By stage.
        precision: Of the forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        metrics: Mapping[str, MetricsLike] | None = None,
        precision: Precision | None = None,
    ) -> None:
        self.model = model
        self.forward_model: Callable[..., Any] = (
            model  # what a training step calls, see `app.distributed.strategies`
        )
        self.precision = precision or Precision("fp32", "cpu")
        given = metrics or {}
        self.metrics = {
            stage: _stage_metrics(given.get(stage, {}), stage)
            for stage in ("train", "valid", "test")
        }
        self.optimizers: OptimWrapperDict | None = None  # set before the first `train_step`

    def train_step(self, batch: Nested) -> StepOutput:
        """Learns from one batch."""
        raise NotImplementedError(f"{type(self).__name__} has no train_step")

    def eval_step(self, stage: str, batch: Nested) -> StepOutput:
        """Measures one batch of `valid` or `test`."""
        raise NotImplementedError(f"{type(self).__name__} has no eval_step")

    def predict_step(self, batch: Nested) -> Nested:
        """What is predicted for one batch."""
        raise NotImplementedError(f"{type(self).__name__} has no predict_step")

    def bn_forward(self, batch: Nested) -> None:
        """Only puts a batch through the model, whose batch statistics are measured anew."""
        self.predict_step(batch)

    def on_step_start(self, epoch: int, step: int) -> None:
        """A step of training comes; both are counted from 1."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """What learns, by name: the model's, and what the task has beside it."""
        return dict(self.model.named_parameters())

    def to(self, device: torch.device) -> None:
        """Moves all that a step uses to the device."""
        self.model.to(device)
        self.metrics = {stage: metrics.to(device) for stage, metrics in self.metrics.items()}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values that a checkpoint holds beside the model's."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""

    @property
    def optimizer(self) -> OptimWrapper:
        """The only one, where there is one alone; else `self.learning[name]`."""
        assert self.optimizers is not None, "nothing is learned here"
        return self.optimizers.single

    def step_output(
        self,
        stage: str,
        outputs: Nested,
        targets: Nested,
        loss: Tensor,
        terms: Mapping[str, Tensor] | None = None,
    ) -> StepOutput:
        """The row of a step.

        Args:
            stage: Whose metrics are measured.
            outputs: As the metrics take them.
            targets: Likewise.
            loss: A scalar, the mean over the batch.
            terms: Further scalars, means over the batch, by the names of their columns.
        """
        count = count_samples(outputs)
        means = {n: average(v, count) for n, v in {"loss": loss, **(terms or {})}.items()}
        means["loss"] = average(loss, count)  # whatever terms are called
        outputs = map_tensors(Tensor.detach, outputs)
        refused = stage == "train" and self.optimizers is not None and self.optimizers.skipped_step
        muted = self.metrics[stage].paused() if refused else nullcontext()
        with self.precision.disabled(), muted:
            wide = map_tensors(self.precision.widened, (outputs, targets))
            sums = self.metrics[stage].sums(*wide)
        return StepOutput({**means, **sums}, outputs)


def check_step_output(task: Task, stage: str, step: object) -> StepOutput:
    """What a step gave back, if it is a step.

    Raises:
        UserError: It is none, or has forgotten the loss.
    """
    if isinstance(step, StepOutput) and "loss" in step.values:
        return step
    method = "train_step" if stage == "train" else "eval_step"
    gave = f"{sorted(step.values)}" if isinstance(step, StepOutput) else describe(step)
    raise UserError(
        f"task: {type(task).__name__}.{method} must return a Step whose values have a 'loss', as "
        f"self.measure(...) makes it; it gave {gave}"
    )


def _stage_metrics(metrics: MetricsLike, stage: str) -> StageMetrics:
    return metrics if isinstance(metrics, StageMetrics) else as_metrics(metrics, stage)
