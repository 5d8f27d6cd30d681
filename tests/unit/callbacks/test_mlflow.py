"""MLflow runs, read back from the file store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from app.callbacks.mlflow import MLflow, sanitize_name
from tests.support.callback_events import send_stage, stage_result


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


def test_sanitize_name_replaces_characters_that_mlflow_rejects() -> None:
    assert sanitize_name("train/f1+f2 (a)") == "train/f1_f2 _a_"
