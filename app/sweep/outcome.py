"""The status of a run as recorded in its folder, and the record of a run that has failed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from app.config.schema import MonitorConfig
from app.config.types import READ_FIELDS, parse_content
from app.distributed.launch.failures import RankFailure, record_rank_failure
from app.distributed.launch.worker import FILE_FORMAT
from app.runtime.errors import UserError
from app.runtime.small_files import read_csv, read_json

PENDING, RUNNING, COMPLETED, PRUNED, FAILED = "pending", "running", "completed", "pruned", "failed"
DIVERGED, DAMAGED = "diverged", "damaged"  # only the table of a report has `damaged`
FINISHED_STATUSES = (COMPLETED, PRUNED, DIVERGED)  # nothing is left to do
STATUS_FILE, SUMMARY_TABLE = "status.json", "summary_table.csv"

Scalar = int | float | str | None
Columns = dict[str, list[Any]]  # of a table, by name


@dataclass(frozen=True)
class StatusFile:
    """The fields of `status.json` that sweeps and reports read."""

    __pydantic_config__ = READ_FIELDS

    status: str
    error: str | None = None
    seconds: float | None = None
    best: BestValue | None = None
    goal: MonitorConfig | None = None
    metrics: dict[str, dict[str, Scalar]] | None = None
    peak_memory_bytes: int | None = None
    peak_device_memory_bytes: int | None = None


@dataclass(frozen=True)
class BestValue:
    """The best value of the goal, and its epoch."""

    value: float | None
    epoch: int


@dataclass(frozen=True)
class RunStatus:
    """Status of a run.

    Attributes:
        status: As in `status.json`; `pending` without that file.
        value: Best value of the goal so far.
        error: One line, if the run has failed.
        content: The content of `status.json`.
    """

    status: str = PENDING
    value: float | None = None
    error: str | None = None
    content: dict[str, Any] = field(default_factory=dict)

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.status in FINISHED_STATUSES


def read_run_status(folder: Path) -> RunStatus:
    """Read the status of the run in a folder.

    Raises:
        UserError: `status.json` is damaged.
    """
    try:
        found = (folder / STATUS_FILE).stat()
    except OSError:
        return _parse_run_status(folder)
    return _read_unchanged(folder, found.st_ino, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=2_000)
def _read_unchanged(folder: Path, inode: int, mtime_ns: int, size: int) -> RunStatus:  # noqa: ARG001
    """Return the status that a file contains as long as it is the same one.

    The table of a sweep is updated after each job, from the status of all jobs.
    """
    return _parse_run_status(folder)


def _parse_run_status(folder: Path) -> RunStatus:
    content = read_json(folder, STATUS_FILE)
    if not content:
        return RunStatus()
    found = parse_content(content, StatusFile, folder / STATUS_FILE)
    value = found.best.value if found.best else None
    return RunStatus(found.status, value, found.error, content)


def read_history(folder: Path) -> Columns:
    """Return the summary table of a run: one row per finished stage; only `stage` is text.

    A value that is missing is NaN.

    Raises:
        UserError: `summary_table.csv` cannot be read or is damaged.
    """
    names, *rows = read_csv(folder, SUMMARY_TABLE) or [["epoch", "stage"]]
    texts = dict(zip(names, zip(*rows, strict=True) if rows else ((),) * len(names), strict=True))
    for name in ("epoch", "stage"):
        if name not in texts:
            problem = f"is damaged: there is no column {name!r}"
            raise UserError(f"{folder / SUMMARY_TABLE} {problem}")
    return {
        name: list(cells) if name == "stage" else _numbers(folder, name, cells)
        for name, cells in texts.items()
    }


def _numbers(folder: Path, name: str, cells: Sequence[str]) -> list[float]:
    try:
        return [float(cell or "nan") for cell in cells]
    except ValueError as error:
        problem = f"is damaged: there is text in the column {name!r}"
        raise UserError(f"{folder / SUMMARY_TABLE} {problem}") from error


def record_failure(folder: Path, failure: RankFailure, write_log: bool = True) -> None:
    """Record in `status.json` and `run.log` of a run that it has failed.

    Args:
        folder: Run folder.
        failure: Failure of the run.
        write_log: Whether to append the failure to `run.log`; False if it is there already.
    """
    if read_run_status(folder).status in (PENDING, RUNNING):
        record_rank_failure(folder, failure)
    if write_log:
        _append_to_log(folder, failure)


def _append_to_log(folder: Path, failure: RankFailure) -> None:
    handler = logging.FileHandler(folder / "run.log")
    handler.setFormatter(logging.Formatter(FILE_FORMAT))
    trace = "" if failure.kind == "user" else f"\n{failure.trace}"
    message = ("the run failed: %s%s", (failure.error, trace), None)
    handler.emit(logging.LogRecord(__name__, logging.ERROR, __file__, 0, *message))
    handler.close()
