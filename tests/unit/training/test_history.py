"""Best epochs, early stopping and remaining time from the rows of a history."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from app.config.schema import GoalConfig
from app.training.history import Row, best_epoch, epochs_since_best, reason_to_stop

GOAL = GoalConfig("accuracy", "max", patience=2, min_delta=0.0, threshold=None)


def make_history(*values: float, stage: str = "valid", name: str = "accuracy") -> list[Row]:
    return [{"epoch": n, "stage": stage, name: v} for n, v in enumerate(values, start=1)]


def test_best_epoch_of_equal_values_is_the_earliest() -> None:
    best = best_epoch(make_history(0.1, 0.5, 0.5, 0.3), GOAL)
    assert best is not None
    assert (best.value, best.epoch) == (0.5, 2)


def test_best_epoch_with_mode_min_may_be_negative_or_above_one() -> None:
    goal = replace(GOAL, metric="loss", mode="min")
    assert best_epoch(make_history(-3.0, -5.0, name="loss_mean"), goal).value == -5.0  # type: ignore[union-attr]
    assert best_epoch(make_history(30.0, 50.0, name="loss_mean"), goal).value == 30.0  # type: ignore[union-attr]


def test_best_epoch_with_mode_max_may_be_negative() -> None:
    assert best_epoch(make_history(-900.0, -800.0), GOAL).value == -800.0  # type: ignore[union-attr]


def test_nan_is_never_best_and_counts_as_no_improvement() -> None:
    history = make_history(math.nan, 0.2, math.nan, math.nan)
    assert best_epoch(history, GOAL).epoch == 2  # type: ignore[union-attr]
    assert epochs_since_best(history, GOAL) == 2
    assert best_epoch(make_history(math.nan), GOAL) is None


def test_best_epoch_uses_only_rows_of_the_goal_stage() -> None:
    goal = replace(GOAL, metric="train/accuracy")
    assert best_epoch(make_history(0.9), goal) is None
    assert best_epoch(make_history(0.9, stage="train"), goal).value == 0.9  # type: ignore[union-attr]


def test_reason_to_stop_after_patience_validations_without_improvement() -> None:
    assert reason_to_stop(make_history(0.5, 0.4), GOAL) is None
    assert "has not improved for 2" in str(reason_to_stop(make_history(0.5, 0.4, 0.5), GOAL))


@pytest.mark.parametrize(("delta", "count"), [(0.0, 0), (0.1, 2)])
def test_improvement_below_min_delta_does_not_reset_patience(delta: float, count: int) -> None:
    assert (
        epochs_since_best(make_history(0.50, 0.55, 0.58), replace(GOAL, min_delta=delta)) == count
    )


def test_slow_improvements_that_exceed_min_delta_together_reset_patience() -> None:
    assert epochs_since_best(make_history(0.50, 0.55, 0.61), replace(GOAL, min_delta=0.1)) == 0


@pytest.mark.parametrize(("mode", "threshold"), [("max", 0.6), ("min", 0.4)])
def test_reason_to_stop_when_threshold_is_reached(mode: str, threshold: float) -> None:
    goal = GoalConfig("accuracy", mode, patience=None, min_delta=0.0, threshold=threshold)  # type: ignore[arg-type]
    assert reason_to_stop(make_history(0.5), goal) is None
    assert "threshold" in str(reason_to_stop(make_history(0.5, threshold), goal))
