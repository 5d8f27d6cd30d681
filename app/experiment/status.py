"""`status.json`: the state of a run, for people and for programs."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from app.config.schema import GoalConfig
from app.config.secrets import redact_text
from app.distributed.collectives import world_size
from app.runtime.device import describe_device, peak_memory
from app.runtime.errors import StorageError
from app.runtime.files import read_status, write_json
from app.runtime.folders import is_in_place
from app.runtime.signals import TrainingInterrupted
from app.training.accumulator import StageResult
from app.training.events import Callback
from app.training.history import BestEpoch, History, StatusName, best_epoch, has_metric
from app.training.nonfinite import NonFiniteStats

log = logging.getLogger(__name__)
RUN_INFO_KEYS = ("mode", "ckpt", "name", "tags", "notes", "seed")  # copied from the configuration


class StatusWriter(Callback):
    """Writes the state of a run to `status.json` whenever it changes.

    Args:
        folder: The run folder.
        run_info: Fields that are known from the start, such as the name and tags of the run.
        goal: The metric and mode that define the best epoch.
        device: The device of the run.
        environment: Fields that say what made the run.
        is_resumed: Whether an earlier run is resumed, whose `seconds` are counted, too.

    Attributes:
        nonfinite: Counts of non-finite steps, which the trainer updates.
    """

    def __init__(
        self,
        folder: Path,
        run_info: dict[str, Any],
        goal: GoalConfig,
        device: torch.device,
        environment: Mapping[str, Any],
        is_resumed: bool = False,
    ) -> None:
        self.folder, self.path, self.run_info = folder, folder / "status.json", run_info
        self.goal, self.device, self.environment = goal, device, environment
        self.history: History = ()
        self.start_time, self.started_at = time.monotonic(), _utc_now()
        self.outcome: StatusName = "completed"
        if is_resumed:
            seconds = read_status(folder).get("seconds")
            self.start_time -= seconds if isinstance(seconds, (int, float)) else 0.0
        self.nonfinite = NonFiniteStats()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Write `running` on entry, and how the run ended on exit."""
        self.write("running")
        try:
            yield
        except KeyboardInterrupt:
            self.write("interrupted")
            raise
        except TrainingInterrupted as interrupt:
            self.write(interrupt.status)
            raise
        except BaseException as error:
            try:
                self.write("failed", redact_text(f"{type(error).__name__}: {error}"))
            except StorageError as storage_error:  # must not hide the error that ended the run
                if not isinstance(error, StorageError) and is_in_place(self.folder):
                    log.error("%s", storage_error)
            raise
        self.write(self.outcome)

    def set_outcome(self, status: StatusName) -> None:
        """Set the status to write when the run ends without an exception."""
        self.outcome = status

    def on_stage_end(self, result: StageResult, history: History) -> None:  # noqa: ARG002
        self.history = history
        self.write("running")

    def write(self, status: StatusName, error: str | None = None) -> None:
        """Replace `status.json`."""
        best = best_epoch(self.history, self.goal) if has_metric(self.history, self.goal) else None
        content = {
            "status": status,
            **self.run_info,
            "started": self.started_at,
            "updated": _utc_now(),
            "seconds": time.monotonic() - self.start_time,
            "goal": {"metric": self.goal.metric, "mode": self.goal.mode},
            "best": _describe_best(best) if best else None,
            "metrics": {str(row["stage"]): row for row in self.history},
            "device": describe_device(self.device),
            **peak_memory(self.device),
            "ranks": world_size(),
            "nonfinite": vars(self.nonfinite),
            "error": error,
            "rank": None,  # the rank that failed; filled in by the process that monitors all ranks
            **self.environment,
        }
        write_json(self.path, content)


def _describe_best(best: BestEpoch) -> dict[str, float]:
    step = {} if best.point.step is None else {"step": best.point.step}
    return {"value": best.value, "epoch": best.epoch, **step}


def _utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
