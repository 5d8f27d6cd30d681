"""Tables of iterations, read back from their files."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

from app.callbacks.tables import Tables, drop_torn_line
from tests.support.callback_events import send_stage


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
