"""Log a run to Weights & Biases."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from app.callbacks.log_values import ExperimentTracker, final_metrics
from app.runtime.errors import UserError
from app.runtime.extras import import_extra
from app.runtime.folders import make_folder
from app.training.events import StageStart
from app.training.history import History

if TYPE_CHECKING:
    from wandb import Run


class WeightsAndBiases(ExperimentTracker):
    """Log the configuration and metrics to `wandb/` in the run folder.

    Metrics are those of each stage by epoch, and of the training by step while an epoch runs.

    Args:
        folder: Run folder.
        config: Resolved configuration.
        project: Name of the project that lists the run.
        mode: `offline` needs neither a network nor an account; `wandb sync` uploads the run later.
        entity: User or team; None selects the user's own default.

    Raises:
        UserError: Weights & Biases is not installed, or the mode is unknown.
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
        wandb = import_extra("wandb", "wandb")
        super().__init__(folder, config)
        self.init_run = partial(
            wandb.init,
            project=project,
            entity=entity,
            mode=mode,
            settings=wandb.Settings(silent=True, console="off"),
        )
        self.run: Run | None = None

    def on_stage_start(self, start: StageStart) -> None:  # noqa: ARG002
        """Create or continue the W&B run at the first stage.

        Not in the constructor: a callback that receives no events must not create a run.
        """
        if self.run is None:
            make_folder(self.folder)  # fails if the run folder is gone; wandb would create it
            self.run = self.init_run(
                dir=self.folder,
                config=self.config,
                name=self.config["name"],
                tags=self.config["tags"],
                notes=self.config["notes"],
                reinit="create_new",
                id=self.run_id or None,
                resume="allow" if self.run_id else None,
            )
            self.run_id = self.run.id
            self.run.define_metric("*", step_metric="epoch")
            self.run.define_metric("train_step/*", step_metric="step")

    def log(self, values: dict[str, float], position: int) -> None:
        assert self.run is not None
        self.run.log({"epoch": position, **values})

    def log_steps(self, values: dict[str, float], step: int) -> None:
        assert self.run is not None
        self.run.log({"step": step, **values})

    def on_run_end(self, history: History) -> None:
        if self.run is not None:
            self.run.summary.update(final_metrics(history, self.goal))
            self.run.finish()
            self.run = None
