"""The callback that writes predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from app.callbacks.predictions import PredictionWriter
from app.runtime.errors import UserError
from tests.support.callback_events import send_stage


def test_predictions_are_written_every_n_epochs_and_always_for_test(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    writer = PredictionWriter(tmp_path, config, ["valid", "test"], every_n_epochs=2)
    batch = (torch.zeros(4, 1, 2, 2), torch.zeros(4, dtype=torch.long))
    for stage, epoch in [("valid", 1), ("train", 2), ("valid", 2), ("valid", 3), ("test", 3)]:
        send_stage(writer, [(batch, torch.eye(4))] * 2, stage, epoch)
    assert sorted(path.name for path in (tmp_path / "predictions").iterdir()) == [
        "epoch002_valid",
        "epoch003_test",
    ]
    table = pd.read_csv(tmp_path / "predictions/epoch002_valid/predictions.csv")
    assert table["label"].tolist() == [0, 1, 2, 3] * 2


def test_predictions_without_outputs_log_a_warning(
    tmp_path: Path, config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    step = ((torch.zeros(2, 1), torch.zeros(2)), None)
    send_stage(PredictionWriter(tmp_path, config), [step], "test")
    assert "the task's steps return no outputs" in caplog.text


def test_predictions_with_unknown_stage_or_format_raise(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=r"\['train'\]; allowed: valid, test"):
        PredictionWriter(tmp_path, config, ["train"])
    with pytest.raises(UserError, match="format='jpg'; allowed: auto, csv, png, npz"):
        PredictionWriter(tmp_path, config, format="jpg")  # type: ignore[arg-type]
