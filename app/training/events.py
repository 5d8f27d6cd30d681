"""The five events of a run, and those who hear of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from app.config.schema import GoalConfig
from app.runtime.nested import Nested
from app.training.accumulator import StageResult
from app.training.history import History


@dataclass(frozen=True)
class StageStart:
    """A stage begins, of so many batches and samples; None where that is not known.

    The stage is `predict` where nothing is measured.
    """

    stage: str
    epoch: int
    num_batches: int | None
    num_samples: int | None


@dataclass(frozen=True)
class StepEnd:
    """A batch has been given to the device; tensors are there, and reading one waits for it.

    With several ranks, batch and outputs are those of rank 0's share, unless `needs_all_ranks`.

    Attributes:
        stage: `train`, `valid`, `test` or `predict`.
        epoch: Counted from 1.
        num_samples: In the batch; with several ranks about so many, all shares together.
        batch: As the model got it.
        outputs: What the model gave; None where the task does not tell.
    """

    stage: str
    epoch: int
    num_samples: int
    batch: Nested
    outputs: Nested


@dataclass(frozen=True)
class EpochEnd:
    """An epoch of training is over.

    Attributes:
        epoch: Counted from 1.
        history: All rows so far.
        goal: What best means.
        epochs_left: At most; None where that is not known.
        valid_every: Epochs from one validation to the next.
        elapsed: Seconds since the start of training.
    """

    epoch: int
    history: History
    goal: GoalConfig
    epochs_left: int | None
    valid_every: int
    elapsed: float


class Callback:
    """Does nothing at each event; subclasses answer those they want.

    They run in rank 0 alone. A constructor is given what it has a parameter for: `folder` (of the
    run), `model` (to be looked at), `config` (the resolved configuration, a plain dict).
    """

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values that it needs to go on when the run does."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""

    def on_stage_start(self, start: StageStart) -> None:
        """A stage begins."""

    def needs_all_ranks(self, start: StageStart) -> bool:  # noqa: ARG002
        """Whether its steps in this stage are to be those of all ranks together, on the host."""
        return False

    def on_step_end(self, step: StepEnd) -> None:
        """A batch has been given to the device."""

    def on_stage_end(self, result: StageResult, history: History) -> None:
        """A stage is over; its row is the last of the history."""

    def on_epoch_end(self, end: EpochEnd) -> None:
        """An epoch is over, validated where that was due."""

    def on_run_end(self, history: History) -> None:
        """Nothing more will come, be it that all went well or not."""


class Callbacks(Callback):
    """Several as one.

    Args:
        callbacks: Told in this order.
    """

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        self.callbacks = list(callbacks)

    @property
    def named(self) -> dict[str, Callback]:
        """By kind and number among those of a kind."""
        kinds = [type(callback).__qualname__ for callback in self.callbacks]
        earlier = [kinds[:place].count(kind) for place, kind in enumerate(kinds)]
        names = [f"{kind}-{count}" for kind, count in zip(kinds, earlier, strict=True)]
        return dict(zip(names, self.callbacks, strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {name: state for name, one in self.named.items() if (state := one.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        named = self.named
        for name in state.keys() & named.keys():
            named[name].load_state_dict(state[name])

    def on_stage_start(self, start: StageStart) -> None:
        for callback in self.callbacks:
            callback.on_stage_start(start)

    def needs_all_ranks(self, start: StageStart) -> bool:
        return any(callback.needs_all_ranks(start) for callback in self.callbacks)

    def on_step_end(self, step: StepEnd) -> None:
        for callback in self.callbacks:
            callback.on_step_end(step)

    def on_stage_end(self, result: StageResult, history: History) -> None:
        for callback in self.callbacks:
            callback.on_stage_end(result, history)

    def on_epoch_end(self, end: EpochEnd) -> None:
        for callback in self.callbacks:
            callback.on_epoch_end(end)

    def on_run_end(self, history: History) -> None:
        for callback in self.callbacks:
            callback.on_run_end(history)
