"""The Weights & Biases callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from app.callbacks.wandb import WeightsAndBiases
from app.runtime.errors import UserError
from app.training.events import StageStart
from app.training.history import Point
from tests.support.callback_events import logged_steps, stage_result
from tests.support.wandb_records import read_wandb_records, wandb_rows


def test_wandb_receives_training_steps_while_an_epoch_runs(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    callback = WeightsAndBiases(tmp_path, config)
    callback.on_stage_start(StageStart("train", Point(1), 3, 12))
    callback.on_steps_logged(logged_steps(1.0, 2.0))
    callback.on_steps_logged(logged_steps(9.0, stage="valid"))
    callback.on_stage_end(stage_result("train"), [])
    callback.on_steps_logged(logged_steps(3.0))
    callback.on_run_end([stage_result("train").row])
    rows = wandb_rows(list(read_wandb_records(tmp_path)))
    steps = [(row["step"], row["train_step/loss"]) for row in rows if "step" in row]
    assert steps == [(2, 1.5), (2, 3.0)]  # the stage had one iteration


def test_wandb_with_unknown_mode_raises(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="mode='off'; allowed: offline, online"):
        WeightsAndBiases(tmp_path, config, mode="off")  # type: ignore[arg-type]
