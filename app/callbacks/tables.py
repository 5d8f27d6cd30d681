"""The CSV files: a line for each iteration, a line for each stage."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from app.callbacks.callback import Callback, StageStart, StepEnd
from app.files import write_csv
from app.history import History
from app.nested import Nested, tensors
from app.records import StageResult

STAGES = ("train", "valid", "test")
TIMES = ("epoch_time", "samples/s")


class Tables(Callback):
    """Writes `epoch_details/` and the summary tables as the run goes.

    Args:
        folder: Of the run.
        throughput: Adds `samples/s` to each iteration.
        memory: Adds `memory_mb` to each iteration, in units of 2**20 bytes: what tensors take on
            the CUDA device, elsewhere what the process takes (not a number where the system does
            not tell).
    """

    def __init__(self, folder: Path, throughput: bool = False, memory: bool = False) -> None:
        self.folder, self.throughput, self.memory = folder, throughput, memory
        self.taken: list[float] = []

    def on_stage_start(self, start: StageStart) -> None:  # noqa: ARG002
        self.taken = []

    def on_step_end(self, step: StepEnd) -> None:
        if self.memory:
            self.taken.append(megabytes(step.batch))

    def on_stage_end(self, result: StageResult, history: History) -> None:
        details = self.folder / "epoch_details"
        name = f"epoch{result.epoch:03d}_{result.stage}"
        write_csv(details / f"{name}.csv", self._with_usage(result.steps))
        for metric, value in result.arrays.items():
            write_csv(details / f"{name}_{metric}.csv", as_table(value))
        summary = summary_table(history)
        write_csv(self.folder / "summary_table.csv", summary)
        own = summary[summary["stage"] == result.stage].dropna(axis="columns", how="all")
        write_csv(self.folder / f"{result.stage}_summary_table.csv", own)

    def _with_usage(self, steps: pd.DataFrame) -> pd.DataFrame:
        """A frame of its own: that of the result belongs to all who watch."""
        if self.throughput:
            steps = steps.assign(**{"samples/s": steps["num_samples"] / steps["iter_time"]})
        return steps.assign(memory_mb=self.taken) if self.memory else steps


def megabytes(batch: Nested) -> float:
    """Memory in use where the batch is; asking does not wait for the device."""
    device = next((tensor.device for tensor in tensors(batch)), torch.device("cpu"))
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    pages = Path("/proc/self/statm")
    if not pages.exists():
        return math.nan
    resident = int(pages.read_text().split()[1])
    return resident * os.sysconf("SC_PAGE_SIZE") / 2**20


def summary_table(history: History) -> pd.DataFrame:
    """All rows, by epoch and stage; times last."""
    rows = sorted(history, key=lambda row: (row["epoch"], STAGES.index(str(row["stage"]))))
    names = dict.fromkeys(name for row in rows for name in row if name not in TIMES)
    return pd.DataFrame(rows, columns=[*names, *TIMES])


def as_table(value: np.ndarray) -> pd.DataFrame:
    """A vector as one line, a matrix as lines of columns 0, 1, ..., more dimensions flattened."""
    return pd.DataFrame(value.reshape(-1, value.shape[-1]))
