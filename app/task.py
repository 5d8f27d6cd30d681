"""What a batch means: forward, losses, metrics, learning. Users subclass this."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from app.learning import Learning
from app.losses.weighted_sum import Function, Term, WeightedSum, as_loss
from app.metrics.output_metric import Selected
from app.metrics.stage_metrics import StageMetrics, as_metrics
from app.optimization import Optimization
from app.records import Mean, StepValues, mean_of
from app.runtime.device import Precision, is_out_of_memory
from app.runtime.errors import UserError
from app.runtime.nested import Key, Nested, count_samples, describe, map_tensors, pick

Forward = Callable[[Nested], Nested]
Measured = StageMetrics | Mapping[str, Metric | Selected | Callable[..., Tensor]]


@dataclass(frozen=True)
class Step:
    """What a step gives back; everything stays on the device.

    Attributes:
        values: The row of the step: the loss and whatever else is to be a column.
        outputs: What the model gave, for those who watch.
        numbers: Further columns, known to the host.
    """

    values: StepValues
    outputs: Nested = None
    numbers: Mapping[str, float] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        """Over which the loss is the mean."""
        loss = self.values["loss"]
        assert isinstance(loss, Mean), "a loss is a mean over samples: mean_of(loss, count)"
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
        metrics: Mapping[str, Measured] | None = None,
        precision: Precision | None = None,
    ) -> None:
        self.model = model
        self.trained: Callable[..., Any] = (
            model  # what a training step calls, see `app.distributed.strategies`
        )
        self.precision = precision or Precision("fp32", "cpu")
        given = metrics or {}
        self.metrics = {
            stage: _stage_metrics(given.get(stage, {}), stage)
            for stage in ("train", "valid", "test")
        }
        self.learning: Learning | None = None  # set before the first `train_step`

    def train_step(self, batch: Nested) -> Step:
        """Learns from one batch."""
        raise NotImplementedError(f"{type(self).__name__} has no train_step")

    def eval_step(self, stage: str, batch: Nested) -> Step:
        """Measures one batch of `valid` or `test`."""
        raise NotImplementedError(f"{type(self).__name__} has no eval_step")

    def predict_step(self, batch: Nested) -> Nested:
        """What is predicted for one batch."""
        raise NotImplementedError(f"{type(self).__name__} has no predict_step")

    def forward_step(self, batch: Nested) -> None:
        """Only puts a batch through the model, whose batch statistics are measured anew."""
        self.predict_step(batch)

    def starts(self, epoch: int, step: int) -> None:
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
    def optimization(self) -> Optimization:
        """The only one, where there is one alone; else `self.learning[name]`."""
        assert self.learning is not None, "nothing is learned here"
        return self.learning.only

    def measure(
        self,
        stage: str,
        outputs: Nested,
        targets: Nested,
        loss: Tensor,
        terms: Mapping[str, Tensor] | None = None,
    ) -> Step:
        """The row of a step.

        Args:
            stage: Whose metrics are measured.
            outputs: As the metrics take them.
            targets: Likewise.
            loss: A scalar, the mean over the batch.
            terms: Further scalars, means over the batch, by the names of their columns.
        """
        count = count_samples(outputs)
        means = {n: mean_of(v, count) for n, v in {"loss": loss, **(terms or {})}.items()}
        means["loss"] = mean_of(loss, count)  # whatever terms are called
        outputs = map_tensors(Tensor.detach, outputs)
        refused = stage == "train" and self.learning is not None and self.learning.has_refused
        muted = self.metrics[stage].muted() if refused else nullcontext()
        with self.precision.off(), muted:
            wide = map_tensors(self.precision.widened, (outputs, targets))
            sums = self.metrics[stage].sums(*wide)
        return Step({**means, **sums}, outputs)


def sound(task: Task, stage: str, step: object) -> Step:
    """What a step gave back, if it is a step.

    Raises:
        UserError: It is none, or has forgotten the loss.
    """
    if isinstance(step, Step) and "loss" in step.values:
        return step
    method = "train_step" if stage == "train" else "eval_step"
    gave = f"{sorted(step.values)}" if isinstance(step, Step) else describe(step)
    raise UserError(
        f"task: {type(task).__name__}.{method} must return a Step whose values have a 'loss', as "
        f"self.measure(...) makes it; it gave {gave}"
    )


def _stage_metrics(metrics: Measured, stage: str) -> StageMetrics:
    return metrics if isinstance(metrics, StageMetrics) else as_metrics(metrics, stage)


class SupervisedTask(Task):
    """Learns targets from inputs.

    Args:
        model: From inputs to outputs, both of any form.
        loss: Of outputs and targets: a function, or terms by name.
        metrics: By stage.
        precision: Of the forward pass.
        inputs: Which part of a batch is the input: a position, a name, or several of them.
        targets: Which part is the target; None where there is none.
        mix: Changes inputs and targets of a training batch, as MixUp; metrics of training are
            measured against the targets as they were.
        patches: Puts inputs through the model window by window when it is evaluated.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: WeightedSum | Term | Function | Mapping[str, Term | Function],
        metrics: Mapping[str, Measured] | None = None,
        precision: Precision | None = None,
        inputs: int | str | list[Any] | dict[str, Any] | None = 0,
        targets: int | str | list[Any] | dict[str, Any] | None = 1,
        mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        patches: Callable[[Forward, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(model, metrics, precision)
        self.loss = as_loss(loss)
        for stage, measured in self.metrics.items():
            for name in self.loss.columns & measured.selected.keys():
                raise ValueError(f"metric {name!r} of {stage} is the column of a loss term")
        self.inputs: Key = inputs
        self.targets: Key = targets
        self.mix, self.patches = mix, patches

    def train_step(self, batch: Nested) -> Step:
        inputs, targets = self.unpack(batch)
        mixed, wanted = self.mix(inputs, targets) if self.mix else (inputs, targets)
        outputs = self.forward(mixed)
        loss, terms = self.loss(outputs, wanted)
        self.optimization.step(loss, count_samples(inputs))
        return self.measure("train", outputs, targets, loss, terms)

    def eval_step(self, stage: str, batch: Nested) -> Step:
        inputs, targets = self.unpack(batch)
        outputs = self.predict(inputs)
        loss, terms = self.loss(outputs, targets)
        return self.measure(stage, outputs, targets, loss, terms)

    def predict_step(self, batch: Nested) -> Nested:
        return self.predict(pick(batch, self.inputs))

    def forward_step(self, batch: Nested) -> None:
        self.forward(pick(batch, self.inputs))

    def unpack(self, batch: Nested) -> tuple[Nested, Nested]:
        """Inputs and targets of a batch."""
        try:
            return pick(batch, self.inputs), _targets(batch, self.targets)
        except UserError as error:
            raise UserError(f"data.inputs, data.targets: in a batch {error}") from error

    def forward(self, inputs: Nested) -> Nested:
        """The model's outputs; several inputs are its arguments.

        While it trains it is called as `trained`, so that several ranks learn as one.

        Raises:
            UserError: It cannot take them.
        """
        model = self.trained if self.model.training else self.model
        try:
            if isinstance(inputs, dict):
                return model(**inputs)
            return model(*inputs) if isinstance(inputs, tuple) else model(inputs)
        except UserError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            if is_out_of_memory(error):
                raise
            name = type(self.model).__name__
            raise UserError(f"model: {name} cannot take {describe(inputs)}: {error}") from error

    def predict(self, inputs: Nested) -> Nested:
        """The outputs where the model is only used."""
        return self.patches(self.forward, inputs) if self.patches else self.forward(inputs)

    def measure(
        self,
        stage: str,
        outputs: Nested,
        targets: Nested,
        loss: Tensor,
        terms: Mapping[str, Tensor] | None = None,
    ) -> Step:
        named = {**(terms or {}), **self.loss.learned()}
        step = super().measure(stage, outputs, targets, loss, named)
        return Step(step.values, step.outputs, self.loss.scheduled())

    def starts(self, epoch: int, step: int) -> None:
        self.loss.progress(epoch, step)

    def parameters(self) -> dict[str, nn.Parameter]:
        own = {f"loss.{name}": p for name, p in self.loss.named_parameters()}
        return super().parameters() | own

    def to(self, device: torch.device) -> None:
        super().to(device)
        self.loss.to(device)

    def state_dict(self) -> dict[str, Any]:
        return {"loss": self.loss.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss.load_state_dict(state["loss"])


def _targets(batch: Nested, key: Key) -> Nested:
    return None if key is None else pick(batch, key)
