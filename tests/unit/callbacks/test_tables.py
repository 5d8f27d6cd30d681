"""Tables of iterations, read back from their files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from app.callbacks import tables as tables_module
from app.callbacks.tables import Tables, drop_torn_line
from app.training.accumulator import StageResult
from app.training.events import StageStart, StepEnd
from app.training.history import Point
from tests.support.callback_events import logged_steps, send_stage


def test_tables_with_usage_columns_leave_the_result_unchanged(tmp_path: Path) -> None:
    tables = Tables(tmp_path, throughput=True, memory=True)
    result = send_stage(tables, [((torch.zeros(4),), None)])
    assert not {"samples/s", "memory_mb"} & set(result.steps)
    written = pd.read_csv(tmp_path / "epoch_details/epoch001_valid.csv")
    assert written["samples/s"].tolist() == [8.0]


def test_tables_by_default_have_no_usage_columns(tmp_path: Path) -> None:
    send_stage(Tables(tmp_path), [((torch.zeros(4),), None)])
    written = pd.read_csv(tmp_path / "epoch_details/epoch001_valid.csv")
    assert not {"samples/s", "memory_mb"} & set(written)


def test_table_of_iterations_grows_while_the_stage_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables_module, "SECONDS_BETWEEN_WRITES", 0.0)
    tables = Tables(tmp_path, throughput=True, memory=True)
    tables.on_stage_start(StageStart("train", Point(1), 3, 12))
    path = tmp_path / "epoch_details/epoch001_train.csv"
    for number in range(1, 4):
        tables.on_step_end(StepEnd("train", 1, 4, (torch.zeros(4),), None, number))
        if number > 1:
            first = 1 if number == 2 else 3
            tables.on_steps_logged(logged_steps(*range(first, number + 1), first=first))
            assert pd.read_csv(path)["loss"].tolist() == [*range(1, number + 1)]
    grown = pd.read_csv(path)
    assert grown["memory_mb"].tolist() == pytest.approx(tables.memory_column, nan_ok=True)
    row = {"epoch": 1, "stage": "train"}
    result = StageResult("train", Point(1), row, logged_steps(1, 2, 3).steps, {})
    tables.on_stage_end(result, [row])
    pd.testing.assert_frame_equal(pd.read_csv(path), grown)
    tables.on_stage_start(StageStart("train", Point(1, 3), 3, 12))
    tables.on_steps_logged(logged_steps(4.0))
    path.unlink()  # the next rows start a new file
    tables.on_steps_logged(logged_steps(5.0, first=2))
    tables.on_stage_end(replace(result, point=Point(1, 5)), [row])
    assert [file.name for file in path.parent.iterdir()] == ["epoch001_step000005_train.csv"]


def test_drop_torn_line_removes_incomplete_last_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, complete = tmp_path / "a.csv", "iter,loss\n1,0.5\n2,0.25\n"
    for length in range(len("iter,loss\n"), len(complete)):
        path.write_text(complete[:length])
        drop_torn_line(path)
        table = pd.read_csv(path)
        assert list(table.columns) == ["iter", "loss"]
        assert table["iter"].tolist() == [1, 2][: len(table)]
        assert table["loss"].tolist() == [0.5, 0.25][: len(table)]
    assert "ends with an incomplete line, which is removed" in caplog.text
