"""History of a run: one row per completed stage, and everything that is derived from the rows.

The best epoch, early stopping, the expected remaining time and the summary tables are functions of
the history, so they are never stored separately.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import pandas as pd

from app.config.schema import STAGES, GoalConfig, MonitorConfig
from app.runtime.errors import UserError, did_you_mean, join_choices

Row = dict[str, float | int | str]
History = Sequence[Row]
StatusName = Literal[
    "running", "completed", "pruned", "diverged", "failed", "interrupted", "preempted"
]
TIME_COLUMNS = ("epoch_time", "samples/s")


class Point(NamedTuple):
    """When weights were measured or saved.

    Attributes:
        epoch: The epoch, counted from 1.
        step: Number of optimizer steps so far, if the run validates within epochs; else None.
    """

    epoch: int
    step: int | None = None

    @property
    def label(self) -> str:
        """The point as part of file names: `epoch003`, or `epoch003_step000150`."""
        return f"epoch{self.epoch:03d}" + ("" if self.step is None else f"_step{self.step:06d}")

    def __str__(self) -> str:
        return f"epoch {self.epoch}" + ("" if self.step is None else f", step {self.step}")


def point_of(row: Row) -> Point:
    """Return when a row of the history, or of a summary table, was measured."""
    step = float(row.get("step", math.nan))
    return Point(int(row["epoch"]), None if math.isnan(step) else int(step))


@dataclass(frozen=True)
class BestEpoch:
    """Value of the goal's metric at a point of the training.

    Attributes:
        value: The value.
        point: When it was measured.
        number: Number of the measurement in a search: the epoch, or how many there were so far if
            the run validates within epochs.
    """

    value: float
    point: Point
    number: int

    @property
    def epoch(self) -> int:
        """Epoch of the measurement, counted from 1."""
        return self.point.epoch


def best_epoch(history: History, goal: MonitorConfig) -> BestEpoch | None:
    """Return the best epoch so far, the earliest if several are equal; None if there is none."""
    values = goal_values(history, goal)
    choose = max if goal.mode == "max" else min
    return choose(values, key=lambda item: item.value) if values else None


def top_k_points(history: History, goal: MonitorConfig, k: int) -> list[Point]:
    """Return when the k best values were measured, the best first; all of them if k is -1."""
    sign = -1 if goal.mode == "max" else 1
    ranked = sorted(goal_values(history, goal), key=lambda item: (sign * item.value, item.number))
    return [item.point for item in ranked][: None if k < 0 else k]


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
    """Return the value of the goal's metric at every point that has one, without NaN."""
    rows = [row for row in history if row["stage"] == goal.stage]
    values = [
        BestEpoch(goal_value(row, goal), point, point.epoch if point.step is None else number)
        for number, (row, point) in enumerate(zip(rows, map(point_of, rows), strict=True), 1)
    ]
    return [item for item in values if not math.isnan(item.value)]


def goal_value_at(history: History, goal: MonitorConfig, point: Point) -> float | None:
    """Return the value of the goal's metric at a point; None if it was not measured."""
    values = goal_values(history, goal)
    return next((item.value for item in values if item.point == point), None)


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


def _table_position(row: Row) -> tuple[int, int, int]:
    point = point_of(row)
    return point.epoch, point.step or 0, STAGES.index(str(row["stage"]))


def summary_table(history: History) -> pd.DataFrame:
    """Return all rows as a table, ordered by epoch, step and stage, with the times last."""
    rows = sorted(history, key=_table_position)
    names = dict.fromkeys(name for row in rows for name in row if name not in TIME_COLUMNS)
    return pd.DataFrame(rows, columns=[*names, *TIME_COLUMNS])
