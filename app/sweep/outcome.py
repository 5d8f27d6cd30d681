"""How a run has ended, from its folder; and saying so where the run itself no longer could."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.distributed.launch.failures import RankFailure, record_rank_failure
from app.runtime.errors import UserError
from app.runtime.files import read_json

PENDING, RUNNING, COMPLETED, PRUNED, FAILED = "pending", "running", "completed", "pruned", "failed"
DIVERGED = "diverged"
FINISHED_STATUSES = (COMPLETED, PRUNED, DIVERGED)  # there is nothing left to do
DATED = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


@dataclass(frozen=True)
class RunStatus:
    """How a run stands.

    Attributes:
        status: As in `status.json`; `pending` where there is none.
        value: The goal's best so far.
        error: In a line, where it failed.
        content: All of `status.json`.
    """

    status: str = PENDING
    value: float | None = None
    error: str | None = None
    content: dict[str, Any] = field(default_factory=dict)

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.status in FINISHED_STATUSES


def read_run_status(folder: Path) -> RunStatus:
    """How the run in that folder stands."""
    content = read_json(folder / "status.json")
    if not content:
        return RunStatus()
    best, status = content.get("best") or {}, content.get("status")
    if not isinstance(status, str) or not isinstance(best, dict):
        raise UserError(f"{folder / 'status.json'} is damaged: it does not say how the run stands")
    return RunStatus(status, best.get("value"), content.get("error"), content)


def record_failure(folder: Path, failure: RankFailure, write_log: bool = True) -> None:
    """The run's own log and `status.json` say how it failed, whatever it could still say.

    Args:
        folder: Of the run.
        failure: Its own.
        says: In the log, too; else it stands there already.
    """
    if read_run_status(folder).status in (PENDING, RUNNING):
        record_rank_failure(folder, failure)
    if write_log:
        _write_in_log(folder, failure)


def _write_in_log(folder: Path, failure: RankFailure) -> None:
    handler = logging.FileHandler(folder / "run.log")
    handler.setFormatter(logging.Formatter(DATED))
    trace = "" if failure.kind == "user" else f"\n{failure.trace}"
    told = ("the run failed: %s%s", (failure.error, trace), None)
    handler.emit(logging.LogRecord(__name__, logging.ERROR, __file__, 0, *told))
    handler.close()
