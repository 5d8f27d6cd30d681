"""The run so far: one plain row for each finished stage; all else is a function of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from app.config.schema import GoalConfig, MonitorConfig
from app.runtime.errors import UserError, nearest, one_of

Row = dict[str, float | int | str]
History = Sequence[Row]
SMOOTHING = 0.3  # weight of the newest epoch in the expected time of the next


@dataclass(frozen=True)
class BestEpoch:
    """The best value of the goal, and the epoch that had it."""

    value: float
    epoch: int


def goal_value(row: Row, goal: MonitorConfig) -> float:
    """The goal's metric in a row of its stage.

    Raises:
        UserError: It was not measured.
    """
    name = "loss_mean" if goal.name == "loss" else goal.name
    if name not in row:
        has = [column for column, value in row.items() if isinstance(value, (int, float))]
        raise UserError(
            f"goal.metric={goal.metric!r} is not measured as a number in {goal.stage}; it has: "
            f"{one_of(has)}{nearest(goal.name, has)}"
        )
    return float(row[name])


def has_metric(history: History, monitor: MonitorConfig) -> bool:
    """Whether every row of its stage has the metric, as a number."""
    name = "loss_mean" if monitor.name == "loss" else monitor.name
    return all(name in row for row in history if row["stage"] == monitor.stage)


def goal_values(history: History, goal: MonitorConfig) -> list[BestEpoch]:
    """The goal's value in every epoch that has one; a NaN is none."""
    rows = [row for row in history if row["stage"] == goal.stage]
    values = [BestEpoch(goal_value(row, goal), int(row["epoch"])) for row in rows]
    return [found for found in values if not math.isnan(found.value)]


def best_epoch(history: History, goal: MonitorConfig) -> BestEpoch | None:
    """The best so far, the earliest among equals; None where nothing is measured yet."""
    values = goal_values(history, goal)
    choose = max if goal.mode == "max" else min
    return choose(values, key=lambda found: found.value) if values else None


def goal_value_at(history: History, goal: MonitorConfig, epoch: int) -> float | None:
    """The goal's value in an epoch; None where it was not measured."""
    values = goal_values(history, goal)
    return next((found.value for found in values if found.epoch == epoch), None)


def top_k_epochs(history: History, goal: MonitorConfig, count: int) -> list[int]:
    """So many epochs of the best values, the best first; -1: all that have one."""
    sign = -1 if goal.mode == "max" else 1
    ranked = sorted(goal_values(history, goal), key=lambda found: (sign * found.value, found.epoch))
    return [found.epoch for found in ranked][: None if count < 0 else count]


def epochs_since_best(history: History, goal: GoalConfig) -> int:
    """Measurements since the last that was better than all before it by more than `min_delta`."""
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
    """Why training ends before its last epoch, in words; None where it goes on."""
    found = best_epoch(history, goal)
    if found is not None and goal.threshold is not None:
        reached = (
            found.value >= goal.threshold if goal.mode == "max" else found.value <= goal.threshold
        )
        if reached:
            return f"{goal.metric}={found.value:.6g} reached the threshold {goal.threshold:g}"
    if goal.patience is not None and (waits := epochs_since_best(history, goal)) >= goal.patience:
        return f"{goal.metric} has not improved for {waits} validations"
    return None


def seconds_left(history: History, epochs_left: int, valid_every: int) -> float:
    """The expected time of the epochs to come, validation counted, by an exponential average."""
    train, valid = (_expected(history, stage) for stage in ("train", "valid"))
    return epochs_left * train + math.ceil(epochs_left / valid_every) * valid


def _expected(history: History, stage: str) -> float:
    times = [float(row["epoch_time"]) for row in history if row["stage"] == stage]
    average = times[0] if times else 0.0
    for seconds in times[1:]:
        average += SMOOTHING * (seconds - average)
    return average


StatusName = Literal[
    "running", "completed", "pruned", "diverged", "failed", "interrupted", "preempted"
]
STAGES = ("train", "valid", "test")
TIMES = ("epoch_time", "samples/s")


def summary_table(history: History) -> pd.DataFrame:
    """All rows, by epoch and stage; times last."""
    rows = sorted(history, key=lambda row: (row["epoch"], STAGES.index(str(row["stage"]))))
    names = dict.fromkeys(name for row in rows for name in row if name not in TIMES)
    return pd.DataFrame(rows, columns=[*names, *TIMES])
