"""MLflow runs, read back from the file store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from app.callbacks.mlflow import MLflow, sanitize_name
from app.training.events import StageStart
from app.training.history import Point
from tests.support.callback_events import logged_steps, send_stage, stage_result


def test_mlflow_writes_one_run_and_leaves_none_active(
    tmp_cwd: Path, config: dict[str, Any]
) -> None:
    import mlflow

    callback = MLflow(tmp_cwd, config)
    assert not (tmp_cwd / "mlruns").exists()  # a callback without events writes nothing
    send_stage(callback, [])
    assert mlflow.active_run() is None
    callback.on_run_end([stage_result(accuracy=0.5).row])
    assert len(list((tmp_cwd / "mlruns").glob("*/*/meta.yaml"))) == 1


def test_mlflow_receives_training_steps_while_an_epoch_runs(
    tmp_cwd: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    callback = MLflow(tmp_cwd, config)
    callback.on_stage_start(StageStart("train", Point(1), 3, 12))
    callback.on_steps_logged(logged_steps(1.0, 2.0))
    callback.on_steps_logged(logged_steps(3.0, first=3))
    client = MlflowClient((tmp_cwd / "mlruns").as_uri())
    found = client.get_metric_history(callback.run_id, "train_step/loss")
    assert [(metric.step, metric.value) for metric in found] == [(2, 1.5), (3, 3.0)]
    callback.on_run_end([])


def test_sanitize_name_replaces_characters_that_mlflow_rejects() -> None:
    assert sanitize_name("train/f1+f2 (a)") == "train/f1_f2 _a_"
