"""Convert the configuration and the results of a run to what experiment trackers log."""

from __future__ import annotations

from typing import Any

from app.config.schema import GoalConfig
from app.training.history import History, Row, best_epoch


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a nested dict by dotted key; lists and empty dicts are leaves."""
    leaves: dict[str, Any] = {}
    for name, value in config.items():
        key = f"{prefix}{name}"
        leaves |= flatten(value, f"{key}.") if isinstance(value, dict) and value else {key: value}
    return leaves


def row_metrics(row: Row) -> dict[str, float]:
    """Return the values of a stage as `<stage>/<name>`."""
    return {
        f"{row['stage']}/{name}": float(value)
        for name, value in row.items()
        if name not in ("epoch", "stage")
    }


def final_metrics(history: History, goal: GoalConfig) -> dict[str, float]:
    """Return the last values of each stage, and `best/<metric>` and `best/epoch` if there are any.

    Args:
        history: All rows of the run.
        goal: Defines the best epoch.
    """
    last = {name: value for row in history for name, value in row_metrics(row).items()}
    best = best_epoch(history, goal)
    return last | ({f"best/{goal.metric}": best.value, "best/epoch": best.epoch} if best else {})
