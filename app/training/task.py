"""Task: what one training, evaluation or prediction step does. Users subclass it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from app.metrics.stage_metrics import MetricLike, StageMetrics
from app.runtime.errors import UserError
from app.runtime.nested import Nested, count_samples, describe, map_tensors
from app.training.optim.optim_wrapper import OptimWrapper, OptimWrapperDict
from app.training.precision import Precision
from app.training.step_values import Average, StepValues, average, zeros_like_row

Forward = Callable[[Nested], Nested]
MetricsLike = StageMetrics | Mapping[str, MetricLike]


class Task:
    """Base class of tasks: the model, its metrics, and what a step does with a batch.

    Override `train_step` to train, `eval_step` to validate and test, and `predict_step` to
    predict. For one model with inputs, targets and a loss, subclass
    `app.training.supervised.SupervisedTask` instead.

    The training loop does the rest. It calls the steps with batches that are on the device, inside
    the autocast of the precision and with the model in training or evaluation mode; `eval_step`
    and `predict_step` also run without gradients. The optimizer wrapper handles accumulation,
    clipping, gradient scaling, reduction over ranks and the learning rate schedule.

    A step must not read tensors on the host (`.item()`, `.cpu()`, `float(tensor)`,
    `if tensor`), since that would wait for the device; return them instead, and they become
    columns of the tables.

    Example::

        class Autoencoder(Task):
            def train_step(self, batch: Nested) -> StepOutput:
                images, _ = batch
                outputs = self.forward_model(images)
                loss = F.mse_loss(outputs, images)
                self.optimizer.step(loss, len(images))
                return self.step_output("train", outputs, images, loss)

            def eval_step(self, stage: str, batch: Nested) -> StepOutput:
                images, _ = batch
                outputs = self.model(images)
                return self.step_output(stage, outputs, images, F.mse_loss(outputs, images))

    With several optimizers, configured under the names of submodules, use
    `self.optimizers["generator"].step(loss, num_samples)`; see
    `app.training.dcgan_task.AdversarialTask`.

    Args:
        model: Module with all trainable parts.
        metrics: Metrics by name for each of the stages `train`, `valid` and `test`. A metric is
            one of torchmetrics, an `OutputMetric`, or a function of outputs and targets.
        precision: Precision of the forward pass; None is fp32.

    Attributes:
        model: The module itself. Use it to evaluate, and to access submodules.
        forward_model: What a training step calls in place of `model`. With several ranks it is the
            strategy that synchronizes gradients, otherwise it is `model`.
        metrics: Metrics of each stage.
        optimizers: Optimizer wrappers by name; None until `prepare_training`.
        has_eval_loss: Whether `eval_step` computes a loss. If not, it returns NaN, and the cells of
            the loss are empty in the tables of evaluated stages.
        replays_steps: Whether training steps are recorded once and replayed.
        can_look_ahead: Whether `look_ahead` makes the forward pass of a training step.
    """

    has_eval_loss = True
    replays_steps = False
    can_look_ahead = False

    def __init__(
        self,
        model: nn.Module,
        metrics: Mapping[str, MetricsLike] | None = None,
        precision: Precision | None = None,
    ) -> None:
        self.model = model
        self.forward_model: Callable[..., Any] = model
        self.precision = precision or Precision("fp32", "cpu")
        metrics = metrics or {}
        self.metrics = {
            stage: _as_stage_metrics(metrics.get(stage, {}), stage)
            for stage in ("train", "valid", "test")
        }
        self.optimizers: OptimWrapperDict | None = None

    def prepare_training(
        self, optimizers: OptimWrapperDict, forward_model: Callable[..., Any] | None = None
    ) -> None:
        """Set what training steps use; call this before the first one.

        Args:
            optimizers: Steps the parameters that `parameters` returns.
            forward_model: Called by training steps in place of the model, as a strategy for
                several ranks is.
        """
        self.optimizers = optimizers
        self.forward_model = forward_model or self.model

    def train_step(self, batch: Nested) -> StepOutput:
        """Train on one batch: compute the loss and step the optimizer.

        Call `self.optimizer.step(loss, num_samples)` once per batch (or each of
        `self.optimizers[name]`); it runs the backward pass and steps when enough batches are
        accumulated. Do not call `loss.backward()` or step optimizers directly.

        Args:
            batch: Batch of the training data, on the device.

        Returns:
            The loss and other values of the step, as `step_output` makes them.
        """
        raise NotImplementedError(f"{type(self).__name__} has no train_step")

    def eval_step(self, stage: str, batch: Nested) -> StepOutput:
        """Evaluate one batch.

        Args:
            stage: `valid`, `test`, or `train` if the training data is evaluated.
            batch: Batch of that stage, on the device.

        Returns:
            The loss and other values of the step, as `step_output` makes them.
        """
        raise NotImplementedError(f"{type(self).__name__} has no eval_step")

    def predict_step(self, batch: Nested) -> Nested:
        """Return the predictions for one batch.

        Args:
            batch: Batch on the device; it may contain targets.

        Returns:
            A tensor, or nested tuples, lists and dicts of tensors, whose first dimension is the
            batch.
        """
        raise NotImplementedError(f"{type(self).__name__} has no predict_step")

    def bn_forward(self, batch: Nested) -> None:
        """Run the forward pass on a training batch to update batch norm statistics.

        Called when the statistics are recomputed for averaged weights. By default it runs
        `predict_step`; override it if that does not use the model as training does.
        """
        self.predict_step(batch)

    def on_step_start(self, epoch: int, step: int) -> None:
        """Called before each training step, for anything that changes by epoch or step.

        Args:
            epoch: Current epoch, counted from 1.
            step: Number of training batches in the run including this one.
        """

    def look_ahead(self, batch: Nested, epoch: int) -> int:
        """Compute the loss of a batch of an epoch that is trained on later, without gradients.

        Called for all batches of an optimizer step before the first of them if the loss depends on
        sums over all of them; see `app.runtime.rank_sums`.

        Returns:
            The number of samples.
        """
        raise NotImplementedError(f"{type(self).__name__} has no look_ahead")

    def prepare_steps(self, first_batch: Callable[[int], Nested]) -> None:
        """Called before each epoch of training if `replays_steps`.

        Args:
            first_batch: Returns that many samples as a batch, on the device.
        """

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters to optimize, by name.

        Override this if the task has parameters outside of the model, such as learned loss weights.
        """
        return dict(self.model.named_parameters())

    @property
    def modules(self) -> list[nn.Module]:
        """All modules that a training step calls."""
        return [self.model]

    def to(self, device: torch.device) -> None:
        """Move the model, the metrics and everything else that a step uses to the device."""
        self.model.to(device)
        self.metrics = {stage: metrics.to(device) for stage, metrics in self.metrics.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold besides the model: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""

    @property
    def optimizer(self) -> OptimWrapper:
        """The optimizer wrapper, if there is only one; otherwise use `self.optimizers[name]`."""
        assert self.optimizers is not None, "the task has no optimizer; it is not being trained"
        return self.optimizers.single

    def step_output(
        self,
        stage: str,
        outputs: Nested,
        targets: Nested,
        loss: Tensor,
        terms: Mapping[str, Tensor] | None = None,
        weight: Tensor | None = None,
    ) -> StepOutput:
        """Update the metrics of a stage, and return the values of a step.

        Nothing is read from the device. The metrics see outputs and targets in float32 even if the
        forward pass runs in a reduced precision.

        Args:
            stage: Stage whose metrics are updated.
            outputs: Outputs, as the metrics of the stage expect them.
            targets: Targets, as the metrics of the stage expect them.
            loss: Scalar, the mean over the batch.
            terms: Further scalars by column name, each the mean over the batch.
            weight: How much the loss counts in a mean over batches, a scalar; None is the number
                of samples.
        """
        count = count_samples(outputs)
        averages = {n: average(v, count) for n, v in {"loss": loss, **(terms or {})}.items()}
        averages["loss"] = average(loss, count, weight)  # even if a term has the name `loss`
        outputs = map_tensors(Tensor.detach, outputs)
        was_refused = self.optimizers is not None and self.optimizers.finite_check.has_refused
        skips = stage == "train" and was_refused
        maybe_paused = self.metrics[stage].paused() if skips else nullcontext()
        with self.precision.disabled(), maybe_paused:
            wide = map_tensors(self.precision.upcast, (outputs, targets))
            sums = self.metrics[stage].update(*wide)
        return StepOutput({**averages, **sums}, outputs)


@dataclass(frozen=True)
class StepOutput:
    """Result of a training or evaluation step; all tensors stay on the device.

    `Task.step_output` makes one. To build one yourself, give `values` at least a `loss`::

        StepOutput({"loss": average(loss, len(inputs)), "entropy": average(entropy, len(inputs))})

    Attributes:
        values: Columns of the step: `average(...)` of a scalar, or the sums of a metric's states.
        outputs: Outputs of the model, detached, for callbacks.
        host_values: Further columns whose values are plain numbers, such as scheduled weights.
    """

    values: StepValues
    outputs: Nested = None
    host_values: Mapping[str, float] = field(default_factory=dict)

    def with_columns(self, values: StepValues) -> StepOutput:
        """Return this output with further columns."""
        return StepOutput({**self.values, **values}, self.outputs, self.host_values)

    def as_padding(self) -> StepOutput:
        """Return this output with values that count for nothing."""
        return StepOutput(zeros_like_row(self.values), self.outputs, self.host_values)

    @property
    def num_samples(self) -> int:
        """Number of samples that the loss is averaged over."""
        loss = self.values["loss"]
        assert isinstance(loss, Average), "the loss must be an Average: average(loss, num_samples)"
        return loss.count


def check_step_output(task: Task, stage: str, output: object) -> StepOutput:
    """Return what a step returned, if it is a `StepOutput` with a loss.

    Raises:
        UserError: If it is anything else.
    """
    if isinstance(output, StepOutput) and "loss" in output.values:
        return output
    method = "train_step" if stage == "train" else "eval_step"
    got = f"{sorted(output.values)}" if isinstance(output, StepOutput) else describe(output)
    raise UserError(
        f"task: {type(task).__name__}.{method} must return a StepOutput whose values include "
        f"'loss', as self.step_output(...) does; got {got}"
    )


def _as_stage_metrics(metrics: MetricsLike, stage: str) -> StageMetrics:
    return metrics if isinstance(metrics, StageMetrics) else StageMetrics(metrics, stage)
