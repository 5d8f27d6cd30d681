"""Supervised learning: inputs, targets, a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from app.losses.weighted_sum import LossFunction, Term, WeightedSum, as_loss
from app.runtime.device import is_out_of_memory
from app.runtime.errors import UserError
from app.runtime.nested import Key, Nested, count_samples, describe, pick
from app.training.precision import Precision
from app.training.task import Forward, MetricsLike, StepOutput, Task


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
        loss: WeightedSum | Term | LossFunction | Mapping[str, Term | LossFunction],
        metrics: Mapping[str, MetricsLike] | None = None,
        precision: Precision | None = None,
        inputs: int | str | list[Any] | dict[str, Any] | None = 0,
        targets: int | str | list[Any] | dict[str, Any] | None = 1,
        mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        patches: Callable[[Forward, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(model, metrics, precision)
        self.loss = as_loss(loss)
        for stage, measured in self.metrics.items():
            for name in self.loss.columns & measured.output_metrics.keys():
                raise ValueError(f"metric {name!r} of {stage} is the column of a loss term")
        self.inputs: Key = inputs
        self.targets: Key = targets
        self.mix, self.patches = mix, patches

    def train_step(self, batch: Nested) -> StepOutput:
        inputs, targets = self.unpack(batch)
        mixed, wanted = self.mix(inputs, targets) if self.mix else (inputs, targets)
        outputs = self.forward(mixed)
        loss, terms = self.loss(outputs, wanted)
        self.optimizer.step(loss, count_samples(inputs))
        return self.step_output("train", outputs, targets, loss, terms)

    def eval_step(self, stage: str, batch: Nested) -> StepOutput:
        inputs, targets = self.unpack(batch)
        outputs = self.predict(inputs)
        loss, terms = self.loss(outputs, targets)
        return self.step_output(stage, outputs, targets, loss, terms)

    def predict_step(self, batch: Nested) -> Nested:
        return self.predict(pick(batch, self.inputs))

    def bn_forward(self, batch: Nested) -> None:
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
        model = self.forward_model if self.model.training else self.model
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

    def step_output(
        self,
        stage: str,
        outputs: Nested,
        targets: Nested,
        loss: Tensor,
        terms: Mapping[str, Tensor] | None = None,
    ) -> StepOutput:
        named = {**(terms or {}), **self.loss.learned_weights()}
        step = super().step_output(stage, outputs, targets, loss, named)
        return StepOutput(step.values, step.outputs, self.loss.scheduled_weights())

    def on_step_start(self, epoch: int, step: int) -> None:
        self.loss.update_weights(epoch, step)

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
