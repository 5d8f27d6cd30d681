"""Supervised learning: one model, inputs, targets and a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from app.losses.weighted_sum import LossFunction, Term, WeightedSum, as_loss
from app.runtime.device import is_out_of_memory
from app.runtime.errors import UserError
from app.runtime.nested import Key, Nested, count_samples, describe, pick
from app.training.cuda_graph import GraphedStep
from app.training.precision import Precision
from app.training.task import Forward, MetricsLike, StepOutput, Task

# Outputs, loss, further columns, weight of the batch.
Learned = tuple[Nested, Tensor, dict[str, Tensor], Tensor | None]
COMPILER_MODULES = ("torch._dynamo", "torch._inductor")  # of the errors of torch.compile


class SupervisedTask(Task):
    """Trains one model to map inputs to targets.

    The building blocks of a step are methods, so that a subclass can override a step in a few
    lines: `unpack` splits a batch, `forward` calls the model, `loss` computes the loss, and
    `step_output` updates the metrics.

    Example::

        class WithNoise(SupervisedTask):
            def train_step(self, batch: Nested) -> StepOutput:
                inputs, targets = self.unpack(batch)
                outputs = self.forward(inputs + 0.1 * torch.randn_like(inputs))
                loss, terms = self.loss(outputs, targets)
                self.optimizer.step(loss, len(inputs))
                return self.step_output("train", outputs, targets, loss, terms)

    A subclass with options of its own takes them in its constructor and passes the rest on
    (`def __init__(self, noise: float, **kwargs): super().__init__(**kwargs)`).

    Args:
        model: Maps inputs to outputs. Both may be tensors or nested tuples, lists and dicts of
            tensors.
        loss: Loss of outputs and targets: a function, a `Term`, terms by name, or a `WeightedSum`.
        metrics: Metrics by name for each of the stages `train`, `valid` and `test`.
        precision: Precision of the forward pass; None is fp32.
        inputs: Key of the inputs in a batch: an index, a name, a dotted path such as `points.0`, or
            a list or dict of them. None takes the complete batch.
        targets: Key of the targets in a batch, in the same form; None if there are none.
        mix: Transforms inputs and targets of a training batch, as MixUp does. The loss uses the
            mixed targets, the metrics the original ones. If it has a method `set_epoch`, that is
            called with the number of the epoch before each step.
        patches: Replaces `forward` in evaluation and prediction: called with `forward` and the
            inputs, for example to run the model on overlapping windows.

    Raises:
        ValueError: If a metric has the name of a column of the loss.
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
        for stage, stage_metrics in self.metrics.items():
            for name in self.loss.columns & stage_metrics.output_metrics.keys():
                raise ValueError(f"metric {name!r} of {stage} is the column of a loss term")
        self.inputs: Key = inputs
        self.targets: Key = targets
        self.mix, self.patches = mix, patches
        self.graphed_step: GraphedStep | None = None

    def train_step(self, batch: Nested) -> StepOutput:
        inputs, targets = self.unpack(batch)
        learn = self.graphed_step or self.learn
        outputs, loss, terms, weight = learn(*self.mixed(inputs, targets))
        return self.step_output("train", outputs, targets, loss, terms, weight)

    def mixed(self, inputs: Nested, targets: Nested) -> tuple[Nested, Nested]:
        """Return inputs and targets as the model is trained on them."""
        return self.mix(inputs, targets) if self.mix else (inputs, targets)

    def learn(self, inputs: Nested, targets: Nested) -> Learned:
        """Run the forward and the backward pass, and step the optimizer.

        Returns:
            The outputs, and what `training_loss` returns.
        """
        outputs = self.forward(inputs)
        loss, terms, weight = self.training_loss(inputs, outputs, targets)
        self.optimizer.step(loss, count_samples(inputs), weight)
        return outputs, loss, terms, weight

    @property
    def can_look_ahead(self) -> bool:  # type: ignore[override]
        own = type(self).train_step, type(self).learn
        has_own_loss = type(self).training_loss is not SupervisedTask.training_loss
        is_default = own == (SupervisedTask.train_step, SupervisedTask.learn)
        return is_default and (has_own_loss or not self.loss.is_torch_loss)

    def look_ahead(self, batch: Nested, epoch: int) -> int:
        self._set_mix_epoch(epoch)
        inputs, targets = self.mixed(*self.unpack(batch))
        self.training_loss(inputs, self.forward(inputs), targets)
        return count_samples(inputs)

    def use_cuda_graph(self) -> None:
        """Record training steps as a CUDA graph; call this after `prepare_training`.

        Raises:
            UserError: The steps of this task cannot be recorded.
        """
        if type(self).train_step is not SupervisedTask.train_step:
            raise UserError(
                f"trainer.cuda_graph=True: {type(self).__name__} has a train_step of its own; "
                "allowed: tasks with that of SupervisedTask, which may override forward, "
                "training_loss and learn"
            )
        self.graphed_step = GraphedStep(self.learn, self.optimizer, self.modules)
        self.replays_steps = True

    def prepare_steps(self, first_batch: Callable[[int], Nested]) -> None:
        assert self.graphed_step is not None
        if not self.graphed_step.is_ready:
            batch = first_batch(self.optimizer.full_batch_size)
            self.graphed_step.prepare(*self.mixed(*self.unpack(batch)))

    def training_loss(
        self,
        inputs: Nested,  # noqa: ARG002 - for subclasses
        outputs: Nested,
        targets: Nested,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """Return the loss of a training step, further columns, and the weight of the batch.

        The weight is that of `step_output`.
        """
        loss, terms = self.loss(outputs, targets)
        return loss, terms, self.loss.samples_weight(targets)

    def eval_step(self, stage: str, batch: Nested) -> StepOutput:
        inputs, targets = self.unpack(batch)
        outputs = self.predict(inputs)
        loss, terms = self.loss(outputs, targets)
        weight = self.loss.samples_weight(targets)
        return self.step_output(stage, outputs, targets, loss, terms, weight)

    def predict_step(self, batch: Nested) -> Nested:
        return self.predict(pick(batch, self.inputs))

    def bn_forward(self, batch: Nested) -> None:
        self.forward(pick(batch, self.inputs))

    def unpack(self, batch: Nested) -> tuple[Nested, Nested]:
        """Return the inputs and the targets of a batch; targets are None if there are none.

        Raises:
            UserError: If the batch has no such parts.
        """
        try:
            return pick(batch, self.inputs), _pick_targets(batch, self.targets)
        except UserError as error:
            raise UserError(f"data.inputs, data.targets: in a batch {error}") from error

    def forward(self, inputs: Nested) -> Nested:
        """Return the model's outputs.

        A tuple of inputs is passed as positional arguments, a dict as keyword arguments. In
        training mode this calls `forward_model`, so that gradients are synchronized over ranks.

        Raises:
            UserError: If the model does not accept the inputs.
        """
        model = self.forward_model if self.model.training else self.model
        return call_model("model", type(self.model).__name__, model, inputs)

    def predict(self, inputs: Nested) -> Nested:
        """Return the model's outputs in evaluation and prediction, by patches if configured."""
        return self.patches(self.forward, inputs) if self.patches else self.forward(inputs)

    def step_output(
        self,
        stage: str,
        outputs: Nested,
        targets: Nested,
        loss: Tensor,
        terms: Mapping[str, Tensor] | None = None,
        weight: Tensor | None = None,
    ) -> StepOutput:
        """Do as `Task.step_output`, and add the weights of the loss terms as columns."""
        columns = {**(terms or {}), **self.loss.learned_weights()}
        output = super().step_output(stage, outputs, targets, loss, columns, weight)
        return StepOutput(output.values, output.outputs, self.loss.scheduled_weights())

    def on_step_start(self, epoch: int, step: int) -> None:
        self.loss.update_weights(epoch, step)
        self._set_mix_epoch(epoch)

    def _set_mix_epoch(self, epoch: int) -> None:
        set_epoch = getattr(self.mix, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)

    def parameters(self) -> dict[str, nn.Parameter]:
        own = {f"loss.{name}": p for name, p in self.loss.named_parameters()}
        return super().parameters() | own

    @property
    def modules(self) -> list[nn.Module]:
        return [self.model, self.loss]

    def to(self, device: torch.device) -> None:
        super().to(device)
        self.loss.to(device)

    def state_dict(self) -> dict[str, Any]:
        return {"loss": self.loss.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss.load_state_dict(state["loss"])


def call_model(key: str, name: str, model: Callable[..., Any], inputs: Nested) -> Nested:
    """Return the outputs of a model; see `SupervisedTask.forward`.

    Args:
        key: Key of the model in the configuration, for errors.
        name: Name of its class, for errors.
        model: The model, or what is called in its place.
        inputs: A tuple of positional arguments, a dict of keyword arguments, or a single one.

    Raises:
        UserError: If the model does not accept the inputs.
    """
    try:
        if isinstance(inputs, dict):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    except UserError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        if type(error).__module__.startswith(COMPILER_MODULES):
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"trainer.compile: {name} cannot be compiled: {reason}; install what is missing, "
                "or set trainer.compile=false, or 'trainer.compile={backend: aot_eager}', which "
                "needs no C++ compiler"
            ) from error
        raise UserError(f"{key}: {name} cannot take {describe(inputs)}: {error}") from error


def _pick_targets(batch: Nested, key: Key) -> Nested:
    return None if key is None else pick(batch, key)
