"""Values that experiment trackers log."""

from __future__ import annotations

from app.callbacks.log_values import final_metrics
from app.config.schema import GoalConfig
from tests.support.callback_events import stage_result


def test_final_metrics_are_the_best_and_the_last() -> None:
    history = [stage_result(epoch=1, accuracy=0.9).row, stage_result(epoch=2, accuracy=0.8).row]
    metrics = final_metrics(history, GoalConfig("accuracy", "max"))
    assert metrics["best/accuracy"] == 0.9
    assert metrics["best/epoch"] == 1
    assert metrics["valid/accuracy"] == 0.8
