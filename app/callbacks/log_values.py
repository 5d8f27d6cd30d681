"""What callbacks that log to an experiment tracker have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from app.config.schema import GoalConfig
from app.training.accumulator import LoggedSteps, StageResult
from app.training.events import Callback
from app.training.history import History, Row, best_epoch


class ExperimentTracker(Callback):
    """Base of callbacks that log to a run of a tracker, and continue it when the run is resumed.

    Args:
        folder: Run folder.
        config: Resolved configuration.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder, self.config, self.goal = folder, config, GoalConfig(**config["goal"])
        self.run_id = ""  # that the tracker gives; empty before the first stage
        self.num_steps = 0  # training steps so far

    def state_dict(self) -> dict[str, Any]:
        return {"run": self.run_id, "steps": self.num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.run_id, self.num_steps = state["run"], state.get("steps", 0)

    def log(self, values: dict[str, float], position: int) -> None:
        """Log the values of a stage by epoch, or by step if the run validates within epochs."""
        raise NotImplementedError

    def log_steps(self, values: dict[str, float], step: int) -> None:
        """Log values over the last training steps, by the number of steps."""
        raise NotImplementedError

    def on_steps_logged(self, logged: LoggedSteps) -> None:
        if logged.stage == "train":
            names = {f"train_step/{name}": value for name, value in logged.recent.items()}
            self.log_steps(names, self.num_steps + int(logged.steps["iter"].iloc[-1]))

    def on_stage_end(self, result: StageResult, history: History) -> None:  # noqa: ARG002
        if result.is_complete:
            self.num_steps += len(result.steps) if result.stage == "train" else 0
            self.log(row_metrics(result.row), result.position)


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
        if name not in ("epoch", "step", "stage")
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
