"""The run as one of Weights & Biases."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from app.callbacks.log_values import final_metrics, row_metrics
from app.config.schema import GoalConfig
from app.runtime.errors import UserError
from app.training.accumulator import StageResult
from app.training.events import Callback, StageStart
from app.training.history import History

if TYPE_CHECKING:
    from wandb import Run


class WeightsAndBiases(Callback):
    """Logs the configuration and each stage's numbers by epoch, into `wandb/` of the run's folder.

    Args:
        folder: Of the run.
        config: The whole configuration.
        project: Under which the run is listed.
        mode: `offline` needs neither a network nor an account; `wandb sync` sends it later.
        entity: A user or a team; None: the user's own default.

    Raises:
        UserError: Weights & Biases is not installed, or the mode is none of these.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        project: str = "app",
        mode: Literal["offline", "online"] = "offline",
        entity: str | None = None,
    ) -> None:
        if mode not in ("offline", "online"):
            raise UserError(f"mode={mode!r}; allowed: offline, online")
        if mode == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            import wandb
        except ImportError as error:
            raise UserError('needs Weights & Biases: pip install -e ".[wandb]"') from error
        self.folder, self.config, self.goal = folder, config, GoalConfig(**config["goal"])
        self.begin = partial(
            wandb.init,
            project=project,
            entity=entity,
            mode=mode,
            settings=wandb.Settings(silent=True, console="off"),
        )
        self.run: Run | None = None
        self.id: str | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"run": self.id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The run that was cut goes on as the same."""
        self.id = state["run"]

    def on_stage_start(self, start: StageStart) -> None:  # noqa: ARG002
        """Begins the run with the first stage, since only then is it known to be watched."""
        if self.run is None:
            self.run = self.begin(
                dir=self.folder,
                config=self.config,
                name=self.config["name"],
                tags=self.config["tags"],
                notes=self.config["notes"],
                reinit="create_new",
                id=self.id,
                resume="allow" if self.id else None,
            )
            self.id = self.run.id
            self.run.define_metric("*", step_metric="epoch")

    def on_stage_end(self, result: StageResult, history: History) -> None:  # noqa: ARG002
        assert self.run is not None
        if result.is_whole:
            self.run.log({"epoch": result.epoch, **row_metrics(result.row)})

    def on_run_end(self, history: History) -> None:
        if self.run is not None:
            self.run.summary.update(final_metrics(history, self.goal))
            self.run.finish()
            self.run = None
