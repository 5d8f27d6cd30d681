"""The run as one of MLflow."""

from __future__ import annotations

import os
import re
import time
from functools import partial
from pathlib import Path
from typing import Any

from app.callbacks.log_values import final_metrics, flatten, row_metrics
from app.config.schema import GoalConfig
from app.runtime.errors import UserError
from app.training.accumulator import StageResult
from app.training.events import Callback, StageStart
from app.training.history import History

LONGEST = 500  # letters of a value that every store takes
ARTIFACTS = ("config.yaml", "summary_table.csv")


class MLflow(Callback):
    """Logs the configuration, each stage's numbers by epoch, and the run's main files.

    Args:
        folder: Of the run.
        config: The whole configuration.
        experiment: Under which the run is listed.
        tracking_uri: None: files in `mlruns` below the working directory, without a server.

    Raises:
        UserError: MLflow is not installed.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        experiment: str = "app",
        tracking_uri: str | None = None,
    ) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # what MLflow asks for, for files
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        try:
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise UserError('needs MLflow: pip install -e ".[mlflow]"') from error
        self.folder, self.config, self.experiment = folder, config, experiment
        self.goal = GoalConfig(**config["goal"])
        self.connect = partial(MlflowClient, tracking_uri or Path("mlruns").absolute().as_uri())
        self.client: MlflowClient | None = None
        self.run_id = ""

    def on_stage_start(self, start: StageStart) -> None:  # noqa: ARG002
        """Begins the run with the first stage, since only then is it known to be watched."""
        if self.client is None:
            self.client = self.connect()
            if self.run_id:
                self.client.update_run(self.run_id, status="RUNNING")
            else:
                self.run_id = self._begun()

    def state_dict(self) -> dict[str, Any]:
        return {"run": self.run_id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The run that was cut goes on as the same."""
        self.run_id = state["run"]

    def on_stage_end(self, result: StageResult, history: History) -> None:  # noqa: ARG002
        if result.is_whole:
            self._log_metrics(row_metrics(result.row), result.epoch)

    def on_run_end(self, history: History) -> None:
        if self.client is None:
            return
        if history:
            last = int(history[-1]["epoch"])
            found = final_metrics(history, self.goal)
            self._log_metrics({k: v for k, v in found.items() if k.startswith("best/")}, last)
        for path in [self.folder / name for name in ARTIFACTS]:
            if path.exists():
                self.client.log_artifact(self.run_id, str(path))
        if (self.folder / "plots").exists():
            self.client.log_artifacts(self.run_id, str(self.folder / "plots"), "plots")
        self.client.set_terminated(self.run_id)
        self.client = None

    def _begun(self) -> str:
        from mlflow.entities import Param

        assert self.client is not None
        found = self.client.get_experiment_by_name(self.experiment)
        number = found.experiment_id if found else self.client.create_experiment(self.experiment)
        tags = {"folder": str(self.folder), "tags": ", ".join(self.config["tags"])}
        tags["mlflow.note.content"] = self.config["notes"]
        run = self.client.create_run(number, run_name=self.config["name"], tags=tags)
        values = flatten(self.config).items()
        params = [Param(allowed(key), str(value)[:LONGEST]) for key, value in values]
        for first in range(0, len(params), 100):  # as many as a server takes at once
            self.client.log_batch(run.info.run_id, params=params[first : first + 100])
        return str(run.info.run_id)

    def _log_metrics(self, values: dict[str, float], epoch: int) -> None:
        from mlflow.entities import Metric

        assert self.client is not None
        now = round(time.time() * 1000)
        metrics = [Metric(allowed(name), value, now, epoch) for name, value in values.items()]
        self.client.log_batch(self.run_id, metrics=metrics)


def allowed(name: str) -> str:
    """The name with what MLflow does not take in names replaced."""
    return re.sub(r"[^\w./ :-]", "_", name)
