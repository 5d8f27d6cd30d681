"""What the TensorBoard, MLflow and Weights & Biases callbacks have in common."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from app.callbacks.mlflow import MLflow
from app.callbacks.tensorboard import TensorBoard
from app.callbacks.wandb import WeightsAndBiases
from app.runtime.errors import UserError
from app.training.events import StageStart
from app.training.history import Point


@pytest.mark.parametrize("callback_class", [MLflow, WeightsAndBiases])
def test_tracker_of_resumed_run_continues_the_same_run(
    tmp_cwd: Path,
    config: dict[str, Any],
    callback_class: type[MLflow] | type[WeightsAndBiases],
) -> None:
    interrupted = callback_class(tmp_cwd, config)
    interrupted.on_stage_start(StageStart("train", Point(1), 1, 1))
    resumed = callback_class(tmp_cwd, config)
    resumed.load_state_dict(interrupted.state_dict())
    interrupted.on_run_end([])
    resumed.on_stage_start(StageStart("train", Point(2), 1, 1))
    assert resumed.state_dict() == interrupted.state_dict()
    assert resumed.state_dict()["run"]
    resumed.on_run_end([])


@pytest.mark.parametrize(
    ("callback_class", "modules", "extra"),
    [
        (TensorBoard, ["tensorboard", "torch.utils.tensorboard"], "tensorboard"),
        (MLflow, ["mlflow", "mlflow.tracking"], "mlflow"),
        (WeightsAndBiases, ["wandb"], "wandb"),
    ],
)
def test_tracker_without_its_library_names_the_extra_to_install(
    callback_class: Any,
    modules: list[str],
    extra: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    config: dict[str, Any],
) -> None:
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    arguments = {"model": nn.Linear(1, 1)} if callback_class is TensorBoard else {}
    with pytest.raises(UserError, match=rf'pip install "torch-experiment-app\[{extra}\]"'):
        callback_class(folder=tmp_path, config=config, **arguments)
