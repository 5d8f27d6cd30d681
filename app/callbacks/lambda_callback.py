"""Plain functions as a callback."""

from __future__ import annotations

from collections.abc import Callable

from app.training.accumulator import StageResult
from app.training.events import Callback, EpochEnd, StageStart, StepEnd
from app.training.history import History


class LambdaCallback(Callback):
    """Call a function at each event for which one is given.

    In YAML, write each function as a node `{_target_: my_module.my_function, _partial_: true}`;
    other keys of the node are passed to the function as keyword arguments.

    Args:
        on_stage_start: Called with a `StageStart`.
        on_step_end: Called with a `StepEnd`.
        on_stage_end: Called with a `StageResult` and the history.
        on_epoch_end: Called with an `EpochEnd`.
        on_run_end: Called with the history.
    """

    def __init__(
        self,
        on_stage_start: Callable[[StageStart], object] | None = None,
        on_step_end: Callable[[StepEnd], object] | None = None,
        on_stage_end: Callable[[StageResult, History], object] | None = None,
        on_epoch_end: Callable[[EpochEnd], object] | None = None,
        on_run_end: Callable[[History], object] | None = None,
    ) -> None:
        self.stage_start = on_stage_start or _ignore
        self.step_end = on_step_end or _ignore
        self.stage_end = on_stage_end or _ignore
        self.epoch_end = on_epoch_end or _ignore
        self.run_end = on_run_end or _ignore

    def on_stage_start(self, start: StageStart) -> None:
        self.stage_start(start)

    def on_step_end(self, step: StepEnd) -> None:
        self.step_end(step)

    def on_stage_end(self, result: StageResult, history: History) -> None:
        self.stage_end(result, history)

    def on_epoch_end(self, end: EpochEnd) -> None:
        self.epoch_end(end)

    def on_run_end(self, history: History) -> None:
        self.run_end(history)


def _ignore(*_: object) -> None:
    pass
