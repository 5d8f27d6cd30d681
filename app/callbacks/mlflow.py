"""Log a run to MLflow."""

from __future__ import annotations

import os
import re
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.callbacks.log_values import ExperimentTracker, final_metrics, flatten
from app.runtime.extras import import_extra
from app.training.events import StageStart
from app.training.history import History

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

MAX_PARAM_LENGTH = 500  # characters of a value that every tracking store accepts
MAX_PARAMS_PER_BATCH = 100  # that a tracking server accepts
ARTIFACTS = ("config.yaml", "summary_table.csv")


class MLflow(ExperimentTracker):
    """Log the configuration, metrics, and the main files of the run.

    Metrics are those of each stage by epoch, and of the training by step while an epoch runs.

    Args:
        folder: Run folder.
        config: Resolved configuration.
        experiment: Name of the MLflow experiment that lists the run.
        tracking_uri: URI of the tracking store; None logs to files in `mlruns` in the working
            directory, without a server.

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
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # required by the file store
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        make_client = import_extra("mlflow.tracking", "mlflow").MlflowClient
        super().__init__(folder, config)
        self.experiment = experiment
        self.make_client = partial(make_client, tracking_uri or Path("mlruns").absolute().as_uri())
        self.client: MlflowClient | None = None

    def on_stage_start(self, start: StageStart) -> None:  # noqa: ARG002
        """Create or continue the MLflow run at the first stage.

        Not in the constructor: a callback that receives no events must not create a run.
        """
        if self.client is None:
            self.client = self.make_client()
            if self.run_id:
                self.client.update_run(self.run_id, status="RUNNING")
            else:
                self.run_id = self._create_run()

    def on_run_end(self, history: History) -> None:
        if self.client is None:
            return
        if history:
            last_epoch = int(history[-1]["epoch"])
            metrics = final_metrics(history, self.goal)
            best = {name: value for name, value in metrics.items() if name.startswith("best/")}
            self.log(best, last_epoch)
        for path in [self.folder / name for name in ARTIFACTS]:
            if path.exists():
                self.client.log_artifact(self.run_id, str(path))
        if (self.folder / "plots").exists():
            self.client.log_artifacts(self.run_id, str(self.folder / "plots"), "plots")
        self.client.set_terminated(self.run_id)
        self.client = None

    def _create_run(self) -> str:
        from mlflow.entities import Param

        assert self.client is not None
        found = self.client.get_experiment_by_name(self.experiment)
        experiment_id = (
            found.experiment_id if found else self.client.create_experiment(self.experiment)
        )
        tags = {"folder": str(self.folder), "tags": ", ".join(self.config["tags"])}
        tags["mlflow.note.content"] = self.config["notes"]
        run = self.client.create_run(experiment_id, run_name=self.config["name"], tags=tags)
        values = flatten(self.config).items()
        params = [Param(sanitize_name(key), str(value)[:MAX_PARAM_LENGTH]) for key, value in values]
        for first in range(0, len(params), MAX_PARAMS_PER_BATCH):
            batch = params[first : first + MAX_PARAMS_PER_BATCH]
            self.client.log_batch(run.info.run_id, params=batch)
        return str(run.info.run_id)

    def log(self, values: dict[str, float], position: int) -> None:
        from mlflow.entities import Metric

        assert self.client is not None
        now = round(time.time() * 1000)
        metrics = [Metric(sanitize_name(n), value, now, position) for n, value in values.items()]
        self.client.log_batch(self.run_id, metrics=metrics)

    def log_steps(self, values: dict[str, float], step: int) -> None:
        self.log(values, step)


def sanitize_name(name: str) -> str:
    """Replace the characters that MLflow does not accept in names."""
    return re.sub(r"[^\w./ :-]", "_", name)
