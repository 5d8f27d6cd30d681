"""The CSV files: a line for each iteration, a line for each stage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from app.callbacks.callback import Callback
from app.files import write_csv
from app.history import History
from app.records import StageResult

STAGES = ("train", "valid", "test")
TIMES = ("epoch_time", "samples/s")


class Tables(Callback):
    """Writes `epoch_details/` and the summary tables as the run goes.

    Args:
        folder: Of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_stage_end(self, result: StageResult, history: History) -> None:
        details = self.folder / "epoch_details"
        name = f"epoch{result.epoch:03d}_{result.stage}"
        write_csv(details / f"{name}.csv", result.steps)
        for metric, value in result.arrays.items():
            write_csv(details / f"{name}_{metric}.csv", as_table(value))
        summary = summary_table(history)
        write_csv(self.folder / "summary_table.csv", summary)
        own = summary[summary["stage"] == result.stage].dropna(axis="columns", how="all")
        write_csv(self.folder / f"{result.stage}_summary_table.csv", own)


def summary_table(history: History) -> pd.DataFrame:
    """All rows, by epoch and stage; times last."""
    rows = sorted(history, key=lambda row: (row["epoch"], STAGES.index(str(row["stage"]))))
    names = dict.fromkeys(name for row in rows for name in row if name not in TIMES)
    return pd.DataFrame(rows, columns=[*names, *TIMES])


def as_table(value: np.ndarray) -> pd.DataFrame:
    """A vector as one line, a matrix as lines of columns 0, 1, ..., more dimensions flattened."""
    return pd.DataFrame(value.reshape(-1, value.shape[-1]))
