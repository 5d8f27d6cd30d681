"""The one complete run of the fast lane."""

from __future__ import annotations

from tests.support.runs import RunResult


def test_run_of_two_epochs_writes_all_files(trained_run: RunResult) -> None:
    names = {
        path.relative_to(trained_run.folder).as_posix() for path in trained_run.folder.rglob("*")
    }
    assert names >= {
        "checkpoints/best.safetensors",
        "checkpoints/last.safetensors",
        "config.yaml",
        "epoch_details/epoch001_train.csv",
        "epoch_details/epoch002_valid.csv",
        "model.pt",
        "run.log",
        "status.json",
        "summary_table.csv",
        "test_summary_table.csv",
    }
    assert trained_run.status["status"] == "completed"
    table = trained_run.csv("summary_table.csv")
    best = int(trained_run.csv("test_summary_table.csv")["epoch"].iloc[0])
    expected = ["train", "valid", "train", "valid"]
    expected.insert(2 * best, "test")  # the row of the test follows those of the best epoch
    assert list(table["stage"]) == expected
