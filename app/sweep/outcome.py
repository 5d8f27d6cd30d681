"""The status of a run as recorded in its folder, and the record of a run that has failed."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.distributed.launch.failures import RankFailure, record_rank_failure
from app.distributed.launch.worker import FILE_FORMAT
from app.runtime.errors import UserError
from app.runtime.files import read_json

PENDING, RUNNING, COMPLETED, PRUNED, FAILED = "pending", "running", "completed", "pruned", "failed"
DIVERGED = "diverged"
FINISHED_STATUSES = (COMPLETED, PRUNED, DIVERGED)  # nothing is left to do


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
    content = read_json(folder / "status.json")
    if not content:
        return RunStatus()
    best, status = content.get("best") or {}, content.get("status")
    if not isinstance(status, str) or not isinstance(best, dict):
        raise UserError(f"{folder / 'status.json'} is damaged: it has no valid status")
    return RunStatus(status, best.get("value"), content.get("error"), content)


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
