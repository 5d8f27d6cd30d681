"""The one whole run of the fast lane."""

from __future__ import annotations

from tests.support.runs import Ran


def test_run_of_two_epochs_leaves_the_promised_files(trained: Ran) -> None:
    names = {path.relative_to(trained.folder).as_posix() for path in trained.folder.rglob("*")}
    assert names >= {
        "checkpoints/best.pt",
        "checkpoints/last.pt",
        "config.yaml",
        "epoch_details/epoch001_train.csv",
        "epoch_details/epoch002_valid.csv",
        "model.pt",
        "run.log",
        "status.json",
        "summary_table.csv",
        "test_summary_table.csv",
    }
    assert trained.status["status"] == "completed"
    assert list(trained.csv("summary_table.csv")["stage"]) == [
        *("train", "valid", "train", "valid", "test")
    ]
