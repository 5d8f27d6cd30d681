"""What a run is reported by elsewhere: its settings and its numbers."""

from __future__ import annotations

from typing import Any

from app.config.schema import GoalConfig
from app.training.history import History, Row, best_epoch


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The innermost values by dotted keys; lists stay whole."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        key = f"{prefix}{name}"
        found |= flatten(value, f"{key}.") if isinstance(value, dict) and value else {key: value}
    return found


def row_metrics(row: Row) -> dict[str, float]:
    """What was measured in a stage, as `<stage>/<name>`."""
    return {
        f"{row['stage']}/{name}": float(value)
        for name, value in row.items()
        if name not in ("epoch", "stage")
    }


def final_metrics(history: History, goal: GoalConfig) -> dict[str, float]:
    """The last numbers of each stage; `best/<metric>` and `best/epoch` where the goal has one."""
    last = {name: value for row in history for name, value in row_metrics(row).items()}
    found = best_epoch(history, goal)
    return last | ({f"best/{goal.metric}": found.value, "best/epoch": found.epoch} if found else {})
