"""Plain functions as a callback."""

from __future__ import annotations

from collections.abc import Callable

from app.training.accumulator import LoggedSteps, StageResult
from app.training.events import Callback, EpochEnd, StageStart, StepEnd
from app.training.history import History


class LambdaCallback(Callback):
    """Call a function at each event for which one is given.

    In YAML, write each function as a node `{_target_: my_module.my_function, _partial_: true}`;
    other keys of the node are passed to the function as keyword arguments.

    Args:
        on_stage_start: Called with a `StageStart`.
        on_step_end: Called with a `StepEnd`.
        on_steps_logged: Called with `LoggedSteps`.
        on_stage_end: Called with a `StageResult` and the history.
        on_epoch_end: Called with an `EpochEnd`.
        on_run_end: Called with the history.
    """

    def __init__(
        self,
        on_stage_start: Callable[[StageStart], object] | None = None,
        on_step_end: Callable[[StepEnd], object] | None = None,
        on_steps_logged: Callable[[LoggedSteps], object] | None = None,
        on_stage_end: Callable[[StageResult, History], object] | None = None,
        on_epoch_end: Callable[[EpochEnd], object] | None = None,
        on_run_end: Callable[[History], object] | None = None,
    ) -> None:
        functions = {
            "on_stage_start": on_stage_start,
            "on_step_end": on_step_end,
            "on_steps_logged": on_steps_logged,
            "on_stage_end": on_stage_end,
            "on_epoch_end": on_epoch_end,
            "on_run_end": on_run_end,
        }
        for event, function in functions.items():
            if function is not None:
                setattr(self, event, function)
