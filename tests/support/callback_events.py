"""Send events to a callback without running a trainer."""

from __future__ import annotations

from typing import Any

import pandas as pd

from app.training.accumulator import LoggedSteps, StageResult
from app.training.events import Callback, StageStart, StepEnd
from app.training.history import Point


def stage_result(stage: str = "valid", epoch: int = 1, **metrics: float) -> StageResult:
    """Return a result of one step with four samples."""
    row = {"epoch": epoch, "stage": stage, "loss_mean": 0.5, **metrics}
    steps = pd.DataFrame(
        {"epoch": epoch, "iter": [1], "stage": stage, "loss": 0.5, "num_samples": 4}
        | {"data_time": 0.1, "iter_time": 0.5}
    )
    return StageResult(stage, Point(epoch), row, steps, {})


def logged_steps(*losses: float, first: int = 1, stage: str = "train") -> LoggedSteps:
    """Return iterations of four samples that are logged while a stage runs."""
    steps = pd.DataFrame(
        {"epoch": 1, "iter": range(first, first + len(losses)), "stage": stage, "loss": losses}
        | {"num_samples": 4, "lr": 0.1, "data_time": 0.1, "iter_time": 0.5}
    )
    values = {"loss": sum(losses) / len(losses), "accuracy": 0.5}
    return LoggedSteps(stage, 1, values, lambda: steps, lambda: values)


def send_stage(
    callback: Callback, steps: list[tuple[Any, Any]], stage: str = "valid", epoch: int = 1
) -> StageResult:
    """Send the events of a stage to a callback.

    Args:
        callback: Callback that receives the events.
        steps: Batch and outputs of each step.
        stage: Name of the stage.
        epoch: Epoch, counted from 1.

    Returns:
        The result of the stage, as the callback received it.
    """
    callback.on_stage_start(StageStart(stage, Point(epoch), len(steps), None))
    for batch, outputs in steps:
        callback.on_step_end(StepEnd(stage, epoch, len(batch[0]), batch, outputs))
    result = stage_result(stage, epoch)
    callback.on_stage_end(result, [result.row])
    return result
