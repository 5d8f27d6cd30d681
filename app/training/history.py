"""History of a run: one row per completed stage, and everything that is derived from the rows.

The best epoch, early stopping, the expected remaining time and the summary tables are functions of
the history, so they are never stored separately.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from app.config.schema import STAGES, GoalConfig, MonitorConfig
from app.runtime.errors import UserError, did_you_mean, join_choices

Row = dict[str, float | int | str]
History = Sequence[Row]
StatusName = Literal[
    "running", "completed", "pruned", "diverged", "failed", "interrupted", "preempted"
]
TIME_COLUMNS = ("epoch_time", "samples/s")


@dataclass(frozen=True)
class BestEpoch:
    """Value of the goal's metric in an epoch."""

    value: float
    epoch: int


def best_epoch(history: History, goal: MonitorConfig) -> BestEpoch | None:
    """Return the best epoch so far, the earliest if several are equal; None if there is none."""
    values = goal_values(history, goal)
    choose = max if goal.mode == "max" else min
    return choose(values, key=lambda item: item.value) if values else None


def top_k_epochs(history: History, goal: MonitorConfig, k: int) -> list[int]:
    """Return the k best epochs, the best first; all epochs with a value if k is -1."""
    sign = -1 if goal.mode == "max" else 1
    ranked = sorted(goal_values(history, goal), key=lambda item: (sign * item.value, item.epoch))
    return [item.epoch for item in ranked][: None if k < 0 else k]


def goal_value(row: Row, goal: MonitorConfig) -> float:
    """Return the value of the goal's metric in a row of its stage.

    Raises:
        UserError: If the row has no such metric.
    """
    name = "loss_mean" if goal.name == "loss" else goal.name
    if name not in row:
        measured = [column for column, value in row.items() if isinstance(value, (int, float))]
        raise UserError(
            f"goal.metric={goal.metric!r} is not measured as a number in {goal.stage}; it has: "
            f"{join_choices(measured)}{did_you_mean(goal.name, measured)}"
        )
    return float(row[name])


def has_metric(history: History, monitor: MonitorConfig) -> bool:
    """Return whether every row of the monitor's stage has its metric as a number."""
    name = "loss_mean" if monitor.name == "loss" else monitor.name
    return all(name in row for row in history if row["stage"] == monitor.stage)


def goal_values(history: History, goal: MonitorConfig) -> list[BestEpoch]:
    """Return the value of the goal's metric in every epoch that has one, without NaN."""
    rows = [row for row in history if row["stage"] == goal.stage]
    values = [BestEpoch(goal_value(row, goal), int(row["epoch"])) for row in rows]
    return [item for item in values if not math.isnan(item.value)]


def goal_value_at(history: History, goal: MonitorConfig, epoch: int) -> float | None:
    """Return the value of the goal's metric in an epoch; None if it was not measured."""
    values = goal_values(history, goal)
    return next((item.value for item in values if item.epoch == epoch), None)


def epochs_since_best(history: History, goal: GoalConfig) -> int:
    """Return the number of measurements since the last improvement.

    An improvement is better than the previous one by more than `min_delta`. NaN is none.
    """
    rows = [row for row in history if row["stage"] == goal.stage]
    sign = 1 if goal.mode == "max" else -1
    reference, since = -math.inf, 0
    for row in rows:
        value = sign * goal_value(row, goal)
        if value > reference + goal.min_delta or (reference == -math.inf and value > reference):
            reference, since = value, 0
        else:
            since += 1
    return since


def reason_to_stop(history: History, goal: GoalConfig) -> str | None:
    """Return why the goal ends training early, as text for the log; None to continue."""
    best = best_epoch(history, goal)
    if best is not None and goal.threshold is not None:
        reached = (
            best.value >= goal.threshold if goal.mode == "max" else best.value <= goal.threshold
        )
        if reached:
            return f"{goal.metric}={best.value:.6g} reached the threshold {goal.threshold:g}"
    if goal.patience is not None and (since := epochs_since_best(history, goal)) >= goal.patience:
        return f"{goal.metric} has not improved for {since} validations"
    return None


def summary_table(history: History) -> pd.DataFrame:
    """Return all rows as a table, ordered by epoch and stage, with the times last."""
    rows = sorted(history, key=lambda row: (row["epoch"], STAGES.index(str(row["stage"]))))
    names = dict.fromkeys(name for row in rows for name in row if name not in TIME_COLUMNS)
    return pd.DataFrame(rows, columns=[*names, *TIME_COLUMNS])
