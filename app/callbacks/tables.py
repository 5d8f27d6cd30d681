"""Write the CSV files of a run: a row per iteration, and a row per stage."""

from __future__ import annotations

import logging
import math
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from app.callbacks.selection import classes_of_metric
from app.config.schema import STAGES
from app.runtime.errors import UserError, as_storage_error
from app.runtime.files import append_csv, write_csv
from app.runtime.nested import Nested, iter_tensors
from app.runtime.small_files import describe_special_file
from app.training.accumulator import LoggedSteps, StageResult
from app.training.events import Callback, StageStart, StepEnd
from app.training.history import History, point_of, summary_table

log = logging.getLogger(__name__)
MAX_LINE_BYTES = 2**20
SECONDS_BETWEEN_WRITES = 5.0  # of iterations of a stage that runs


class Tables(Callback):
    """Write `epoch_details/` and the summary tables.

    The table of iterations grows while the stage runs, and is written once more when it ends.

    Args:
        folder: Run folder.
        throughput: Whether to add a column `samples/s` to the iterations.
        memory: Whether to add a column `memory_mb` to the iterations, in MiB: the memory of
            tensors on a CUDA device, else the resident memory of the process (NaN if the operating
            system does not report it).
        config: Resolved configuration, for the names of classes; None if there is none.
    """

    def __init__(
        self,
        folder: Path,
        throughput: bool = False,
        memory: bool = False,
        config: dict[str, Any] | None = None,
    ) -> None:
        self.folder, self.throughput, self.memory, self.config = folder, throughput, memory, config
        self.memory_column: list[float] = []
        self.restored_column: list[float] = []  # of a stage that was interrupted
        self.stage = ""  # current stage
        self.num_written = 0  # iterations of it
        self.last_written = 0.0
        self.waiting: list[LoggedSteps] = []  # not yet written
        self.live_path: Path | None = None  # of the table while the stage runs

    def state_dict(self) -> dict[str, Any]:
        is_resumable = self.memory and self.stage == "train"  # other stages start over
        return {"taken": self.memory_column} if is_resumable and self.memory_column else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.restored_column = state["taken"]

    def on_stage_start(self, start: StageStart) -> None:
        self.stage, self.memory_column, self.restored_column = start.stage, self.restored_column, []
        self.num_written, self.last_written = 0, time.monotonic()
        self.waiting, self.live_path = [], None

    def on_step_end(self, step: StepEnd) -> None:
        if self.memory:
            self.memory_column.append(memory_mb(step.batch))

    def on_steps_logged(self, logged: LoggedSteps) -> None:
        self.waiting.append(logged)
        if time.monotonic() - self.last_written < SECONDS_BETWEEN_WRITES:
            return
        steps = self._with_usage(pd.concat([item.steps for item in self.waiting]), self.num_written)
        path = self.folder / "epoch_details" / f"epoch{logged.epoch:03d}_{logged.stage}.csv"
        self.live_path = path  # the name of a part of an epoch is only known at its end
        if self.num_written and path.exists():
            append_csv(path, steps)
        else:
            write_csv(path, steps)
        self.num_written += len(steps)
        self.last_written, self.waiting = time.monotonic(), []

    def on_stage_end(self, result: StageResult, history: History) -> None:
        details = self.folder / "epoch_details"
        name = f"{result.point.label}_{result.stage}"
        write_csv(details / f"{name}.csv", self._with_usage(result.steps))
        if self.live_path is not None and self.live_path.stem != name:
            self.live_path.unlink(missing_ok=True)
        for metric, value in result.arrays.items():
            classes = classes_of_metric(self.config, result.stage, metric, value.shape[-1])
            write_csv(details / f"{name}_{metric}.csv", array_table(value, classes))
        write_summaries(self.folder, history, [result.stage])
        if result.is_complete:
            self.memory_column = []

    def _with_usage(self, steps: pd.DataFrame, first: int = 0) -> pd.DataFrame:
        """Return a copy with the optional columns; other callbacks share the original.

        Args:
            steps: Rows of consecutive iterations.
            first: Number of iterations of the stage before them.
        """
        if self.throughput:
            steps = steps.assign(**{"samples/s": steps["num_samples"] / steps["iter_time"]})
        if self.memory:
            memory = self.memory_column[first : first + len(steps)]
            # Steps of an interrupted run that did not record memory
            unknown = [math.nan] * (len(steps) - len(memory))
            steps = steps.assign(memory_mb=[*unknown, *memory])
        return steps


def write_summaries(folder: Path, history: History, stages: Sequence[str]) -> None:
    """Write the summary table of all stages, and one for each of the given stages."""
    summary = summary_table(history)
    write_csv(folder / "summary_table.csv", summary)
    for stage in stages:
        rows = summary[summary["stage"] == stage].dropna(axis="columns", how="all")
        write_csv(folder / f"{stage}_summary_table.csv", rows)


def memory_mb(batch: Nested) -> float:
    """Return the memory in use on the device of a batch, in MiB, without synchronizing."""
    device = next((tensor.device for tensor in iter_tensors(batch)), torch.device("cpu"))
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return math.nan
    resident_pages = int(statm.read_text().split()[1])
    return resident_pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def array_table(value: np.ndarray, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Return a vector as one row and an array as rows of its last dimension.

    Args:
        value: Array of one or more dimensions.
        columns: Names of the columns; None numbers them.
    """
    table = pd.DataFrame(value.reshape(-1, value.shape[-1]))
    return table if columns is None else table.set_axis([*columns], axis=1)


def truncate_to_history(folder: Path, history: History) -> None:
    """Remove table rows and files of stages that are not in the history.

    An interrupted run may have written more than the checkpoint that it resumes from contains.

    Raises:
        StorageError: A file cannot be changed.
    """
    try:
        _truncate(folder, history)
    except OSError as error:
        raise as_storage_error(error) from error


def _truncate(folder: Path, history: History) -> None:
    kept = {f"{point_of(row).label}_{row['stage']}" for row in history}
    kept_stages = {str(row["stage"]) for row in history}
    for path in (folder / "epoch_details").glob("epoch*.csv"):
        match = re.fullmatch(r"(epoch\d+(?:_step\d+)?_(?:train|valid|test))(_.*)?", path.stem)
        if match is not None and match[1] not in kept:
            path.unlink()
        elif match is not None:
            drop_torn_line(path)
    existing = [stage for stage in STAGES if (folder / f"{stage}_summary_table.csv").exists()]
    if existing and history:
        write_summaries(folder, history, [stage for stage in existing if stage in kept_stages])
    for stage in existing:
        if stage not in kept_stages:
            (folder / f"{stage}_summary_table.csv").unlink()


def drop_torn_line(path: Path) -> None:
    """Remove an incomplete last line from a file, of which only the end is read.

    Raises:
        UserError: It is not a regular file, or its last line is longer than any of this program.
    """
    if special := describe_special_file(path):
        raise UserError(f"{path} is {special}; allowed: a regular file")
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        start = file.seek(max(0, size - MAX_LINE_BYTES))
        end = file.read()
        if not end or end.endswith(b"\n"):
            return
        if start and b"\n" not in end:
            raise UserError(f"{path} is damaged: its last line has over {MAX_LINE_BYTES:,} bytes")
        log.warning("%s ends with an incomplete line, which is removed", path)
        file.truncate(start + end.rfind(b"\n") + 1)
