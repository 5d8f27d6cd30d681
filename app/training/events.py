"""Events of a run, and the callbacks that receive them.

The training loop calls each event on rank 0 with a small dataclass of values. Concrete callbacks
(tables, progress bars, loggers, ...) are in `app/callbacks/`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from app.config.schema import GoalConfig
from app.runtime.nested import Nested
from app.training.accumulator import LoggedSteps, StageResult
from app.training.history import History, Point


@dataclass(frozen=True)
class StageStart:
    """A pass over the data is about to start.

    Attributes:
        stage: `train`, `valid`, `test` or `predict`.
        point: Epoch that is trained, or whose weights are evaluated, and the number of optimizer
            steps so far if the run validates within epochs.
        num_batches: Number of batches of the data; None if unknown.
        num_samples: Number of its samples, over all ranks; None if unknown.
        num_epochs: Maximum number of epochs of the training; None if unknown, or outside a
            training.
    """

    stage: str
    point: Point
    num_batches: int | None
    num_samples: int | None
    num_epochs: int | None = None

    @property
    def epoch(self) -> int:
        """Epoch that is trained, or whose weights are evaluated; counted from 1."""
        return self.point.epoch


@dataclass(frozen=True)
class StepEnd:
    """A batch has been processed.

    Tensors are still on the device, and on a CUDA device the step may not have finished; reading
    one (`.item()`, `.cpu()`, `print`) waits for it and slows training down. With several ranks,
    `batch` and `outputs` are those of rank 0, unless `Callback.needs_all_ranks` asks for all.

    `loss` and `metrics` are plain numbers that have reached the host without a wait; they are
    behind by some steps, see `Callback.on_steps_logged`.

    Attributes:
        stage: `train`, `valid`, `test` or `predict`.
        epoch: Epoch that is trained, or whose weights are evaluated; counted from 1.
        num_samples: Number of samples in the batch. With several ranks it is an estimate of the
            total: the samples of rank 0 times the number of ranks.
        batch: The batch as the task received it.
        outputs: Outputs of the model, detached; None if the task does not return any.
        step: Number of the batch in the stage, counted from 1.
        so_far: Mean loss and metrics of the stage, as far as they are known, by name.
        lrs: Learning rates of a training step by column name: `lr`, or `lr_<optimizer>`.
        seconds_left: Expected seconds until the training ends; None if unknown.
    """

    stage: str
    epoch: int
    num_samples: int
    batch: Nested
    outputs: Nested
    step: int = 0
    so_far: Mapping[str, float] = field(default_factory=dict)
    lrs: Mapping[str, float] = field(default_factory=dict)
    seconds_left: float | None = None

    @property
    def loss(self) -> float:
        """Mean loss of the stage, as far as it is known; NaN before it is."""
        return self.so_far.get("loss", math.nan)

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of the stage, as far as they are known, by name."""
        return {name: value for name, value in self.so_far.items() if name != "loss"}


@dataclass(frozen=True)
class EpochEnd:
    """An epoch of training, or a part of one, is complete, including validation if it was due.

    Attributes:
        point: The epoch, and the number of optimizer steps so far if the run validates within
            epochs.
        history: Rows of all completed stages, oldest first.
        goal: Metric that decides which epoch is best.
        elapsed: Seconds since training started or resumed.
        seconds_left: Expected seconds until the training ends; None if unknown.
        is_complete: Whether the epoch is complete; it continues after a validation within it.
    """

    point: Point
    history: History
    goal: GoalConfig
    elapsed: float
    seconds_left: float | None
    is_complete: bool = True

    @property
    def epoch(self) -> int:
        """The epoch, counted from 1."""
        return self.point.epoch


class Callback:
    """Base class of callbacks; override the events that you need.

    A callback observes the run. It receives values, never the trainer, and runs on rank 0 only. It
    may ask to end the training with `self.request_stop("reason")`, in any of its events. Events
    come in this order::

        for each epoch:
            on_stage_start         # "train"
            on_step_end            # for every batch
            on_steps_logged        # about every second
            on_stage_end
            on_stage_start, ...    # "valid", if validation is due
            on_epoch_end
        on_stage_start, ...        # "test"
        on_run_end

    With `trainer.valid_every_n_steps` an epoch has several parts, each with these events.

    The stage `predict` of `mode=predict` has no `on_stage_end`, as nothing is measured.

    Besides the options in its configuration, the constructor of a callback receives any of these
    if it has a parameter of that name: `folder` (path of the run folder), `model` (the module, for
    inspection), `config` (the resolved configuration as a plain dict), `paths` (the file of each
    sample, by stage, where samples are files) and `summarize` (a function without arguments that
    measures the model, see `app.training.model_summary.Summary`).

    Example::

        class PrintLoss(Callback):
            def __init__(self, digits: int = 3) -> None:
                self.digits = digits

            def on_stage_end(self, result: StageResult, history: History) -> None:
                print(result.stage, round(result.row["loss_mean"], self.digits))

    and in the configuration, with `trusted_targets=[my_callbacks]`::

        callbacks:
          print_loss:
            _target_: my_callbacks.PrintLoss
            digits: 4
    """

    stop_reason: str | None = None

    def request_stop(self, reason: str) -> None:
        """End the training after the current step; it is validated, saved and tested as usual.

        Args:
            reason: Why, as text for the log.
        """
        self.stop_reason = reason

    def state_dict(self) -> dict[str, Any]:
        """Return what must survive a restart: tensors and plain values (str, int, list, dict, ...).

        The state is saved in each `last.safetensors`, and given to `load_state_dict` when the run
        is resumed.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned; called before training resumes."""

    def on_stage_start(self, start: StageStart) -> None:
        """Called before the first batch of a stage."""

    def needs_all_ranks(self, start: StageStart) -> bool:  # noqa: ARG002
        """Return whether `on_step_end` needs the batches and outputs of all ranks in this stage.

        They are then gathered on the host after every step, which costs time with several ranks.
        """
        return False

    def on_step_end(self, step: StepEnd) -> None:
        """Called after each batch of any stage, without waiting for the device.

        Do not read tensors here unless you need to; see `StepEnd`.
        """

    def on_steps_logged(self, logged: LoggedSteps) -> None:
        """Called while a stage runs, with values that have reached the host without a wait.

        They are copied every `trainer.log_every_n_steps` steps, and the event comes at most once
        per second. What remains when the stage ends is only in `on_stage_end`.
        """

    def on_stage_end(self, result: StageResult, history: History) -> None:
        """Called after the last batch of `train`, `valid` or `test`.

        When a run is interrupted during training, it is called with the part so far
        (`result.is_complete` is False), and again with the complete stage after the run is resumed.

        Args:
            result: Values of the stage and of each iteration.
            history: Rows of all completed stages; the last one is `result.row`.
        """

    def on_epoch_end(self, end: EpochEnd) -> None:
        """Called after each epoch of training or part of one, once it is validated and saved."""

    def on_run_end(self, history: History) -> None:
        """Called once at the end of the run, also if it failed or was interrupted.

        Args:
            history: Rows of all completed stages.
        """


class Callbacks(Callback):
    """Several callbacks as one.

    Args:
        callbacks: Called in this order.
    """

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        self.callbacks = list(callbacks)

    @property
    def stop_reason(self) -> str | None:  # type: ignore[override]
        """Why a callback asks to end the training; None if none does."""
        for callback in self.callbacks:  # after every step
            if callback.stop_reason is not None:
                return callback.stop_reason
        return None

    @property
    def by_name(self) -> dict[str, Callback]:
        """Callbacks by class name and index among those of the same class: `Tables-0`."""
        classes = [type(callback).__qualname__ for callback in self.callbacks]
        indices = [classes[:place].count(name) for place, name in enumerate(classes)]
        names = [f"{name}-{index}" for name, index in zip(classes, indices, strict=True)]
        return dict(zip(names, self.callbacks, strict=True))

    def state_dict(self) -> dict[str, Any]:
        states = {name: callback.state_dict() for name, callback in self.by_name.items()}
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        callbacks = self.by_name
        for name in state.keys() & callbacks.keys():
            callbacks[name].load_state_dict(state[name])

    def on_stage_start(self, start: StageStart) -> None:
        for callback in self.callbacks:
            callback.on_stage_start(start)

    def needs_all_ranks(self, start: StageStart) -> bool:
        return any(callback.needs_all_ranks(start) for callback in self.callbacks)

    def on_step_end(self, step: StepEnd) -> None:
        for callback in self.callbacks:
            callback.on_step_end(step)

    def on_steps_logged(self, logged: LoggedSteps) -> None:
        for callback in self.callbacks:
            callback.on_steps_logged(logged)

    def on_stage_end(self, result: StageResult, history: History) -> None:
        for callback in self.callbacks:
            callback.on_stage_end(result, history)

    def on_epoch_end(self, end: EpochEnd) -> None:
        for callback in self.callbacks:
            callback.on_epoch_end(end)

    def on_run_end(self, history: History) -> None:
        for callback in self.callbacks:
            callback.on_run_end(history)
