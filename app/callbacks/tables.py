"""The CSV files: a line for each iteration, a line for each stage."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from app.runtime.errors import as_storage_error
from app.runtime.files import atomic_write, write_csv
from app.runtime.nested import Nested, tensors
from app.training.accumulator import StageResult
from app.training.events import Callback, StageStart, StepEnd
from app.training.history import STAGES, History, summary_table

log = logging.getLogger(__name__)


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
        self.before: list[float] = []  # of a stage that was cut
        self.stage = ""  # the one under way

    def state_dict(self) -> dict[str, Any]:
        goes_on = self.memory and self.stage == "train"  # others begin anew
        return {"taken": self.taken} if goes_on and self.taken else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.before = state["taken"]

    def on_stage_start(self, start: StageStart) -> None:
        self.stage, self.taken, self.before = start.stage, self.before, []

    def on_step_end(self, step: StepEnd) -> None:
        if self.memory:
            self.taken.append(memory_mb(step.batch))

    def on_stage_end(self, result: StageResult, history: History) -> None:
        details = self.folder / "epoch_details"
        name = f"epoch{result.epoch:03d}_{result.stage}"
        write_csv(details / f"{name}.csv", self._with_usage(result.steps))
        for metric, value in result.arrays.items():
            write_csv(details / f"{name}_{metric}.csv", as_table(value))
        write_summaries(self.folder, history, [result.stage])
        if result.is_whole:
            self.taken = []

    def _with_usage(self, steps: pd.DataFrame) -> pd.DataFrame:
        """A frame of its own: that of the result belongs to all who watch."""
        if self.throughput:
            steps = steps.assign(**{"samples/s": steps["num_samples"] / steps["iter_time"]})
        if self.memory:
            unknown = [math.nan] * (len(steps) - len(self.taken))  # before it was wanted
            steps = steps.assign(memory_mb=[*unknown, *self.taken])
        return steps


def write_summaries(folder: Path, history: History, stages: Sequence[str]) -> None:
    """The table of all stages, and one for each of those."""
    summary = summary_table(history)
    write_csv(folder / "summary_table.csv", summary)
    for stage in stages:
        own = summary[summary["stage"] == stage].dropna(axis="columns", how="all")
        write_csv(folder / f"{stage}_summary_table.csv", own)


def truncate_to_history(folder: Path, history: History) -> None:
    """Takes away what a run had written that now goes on from before it, or begins anew.

    Raises:
        StorageError: It may not be.
    """
    try:
        _drop_after(folder, history)
    except OSError as error:
        raise as_storage_error(error) from error


def _drop_after(folder: Path, history: History) -> None:
    kept = {(int(row["epoch"]), str(row["stage"])) for row in history}
    for path in (folder / "epoch_details").glob("epoch*.csv"):
        found = re.fullmatch(r"epoch(\d+)_(train|valid|test)(_.*)?", path.stem)
        if found is not None and (int(found[1]), found[2]) not in kept:
            path.unlink()
        elif found is not None:
            drop_torn_line(path)
    there = [stage for stage in STAGES if (folder / f"{stage}_summary_table.csv").exists()]
    if there and history:
        write_summaries(folder, history, [s for s in there if any(s == stage for _, stage in kept)])
    for stage in there:
        if not any(stage == one for _, one in kept):
            (folder / f"{stage}_summary_table.csv").unlink()


def drop_torn_line(path: Path) -> None:
    """Takes away a last line that was cut off."""
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        log.warning("%s was cut off: its last line is dropped", path)
        atomic_write(path, lambda file: file.write(content[: content.rfind(b"\n") + 1]))


def memory_mb(batch: Nested) -> float:
    """Memory in use where the batch is; asking does not wait for the device."""
    device = next((tensor.device for tensor in tensors(batch)), torch.device("cpu"))
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    pages = Path("/proc/self/statm")
    if not pages.exists():
        return math.nan
    resident = int(pages.read_text().split()[1])
    return resident * os.sysconf("SC_PAGE_SIZE") / 2**20


def as_table(value: np.ndarray) -> pd.DataFrame:
    """A vector as one line, a matrix as lines of columns 0, 1, ..., more dimensions flattened."""
    return pd.DataFrame(value.reshape(-1, value.shape[-1]))
