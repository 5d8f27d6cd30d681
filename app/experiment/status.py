"""`status.json`: how the run stands, for people and for programs."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from app.config.schema import GoalConfig
from app.config.secrets import redact_text
from app.distributed.collectives import world_size
from app.runtime.device import describe_device, peak_memory
from app.runtime.errors import StorageError
from app.runtime.files import read_status, write_json
from app.runtime.signals import TrainingInterrupted
from app.training.accumulator import StageResult
from app.training.events import Callback
from app.training.history import History, StatusName, best_epoch, has_metric
from app.training.nonfinite import NonFiniteStats

log = logging.getLogger(__name__)
LIBRARIES = ("torch", "torchvision", "torchmetrics", "hydra-core", "omegaconf", "numpy", "pandas")


class StatusWriter(Callback):
    """The state of a run, written whenever it changes.

    Args:
        folder: Of the run.
        about: What is known from the start, as its name and tags.
        goal: What best means.
        device: On which it runs.
        goes_on: It is a run that was cut: its seconds count, too.
    """

    def __init__(
        self,
        folder: Path,
        about: dict[str, Any],
        goal: GoalConfig,
        device: torch.device,
        goes_on: bool = False,
    ) -> None:
        self.path, self.about = folder / "status.json", about
        self.goal, self.device = goal, device
        self.history: History = ()
        self.began, self.started = time.monotonic(), _now()
        self.final_status: StatusName = "completed"
        if goes_on:
            seconds = read_status(folder).get("seconds")
            self.began -= seconds if isinstance(seconds, (int, float)) else 0.0
        self.nonfinite = NonFiniteStats()  # who trains puts its own in place

    @contextmanager
    def recording(self) -> Iterator[None]:
        """`running` inside; then `completed`, or what else became of it."""
        self.write("running")
        try:
            yield
        except KeyboardInterrupt:
            self.write("interrupted")
            raise
        except TrainingInterrupted as stopped:
            self.write(stopped.state)
            raise
        except BaseException as error:
            try:
                self.write("failed", redact_text(f"{type(error).__name__}: {error}"))
            except StorageError as full:  # what it ended by is what has to be said
                log.error("%s", full)
            raise
        self.write(self.final_status)

    def on_stage_end(self, result: StageResult, history: History) -> None:  # noqa: ARG002
        self.history = history
        self.write("running")

    def write(self, state: StatusName, error: str | None = None) -> None:
        """Replaces the file."""
        found = best_epoch(self.history, self.goal) if has_metric(self.history, self.goal) else None
        content = {
            "status": state,
            **self.about,
            "started": self.started,
            "updated": _now(),
            "seconds": time.monotonic() - self.began,
            "goal": {"metric": self.goal.metric, "mode": self.goal.mode},
            "best": {"value": found.value, "epoch": found.epoch} if found else None,
            "metrics": {str(row["stage"]): row for row in self.history},
            "device": describe_device(self.device),
            **peak_memory(self.device),
            "ranks": world_size(),
            "nonfinite": self.nonfinite.to_dict(),
            "error": error,
            "rank": None,  # that failed; whoever watches over all of them knows
            "versions": versions(),
        }
        write_json(self.path, content)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Of Python, the platform and the libraries."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: version(name) for name in LIBRARIES},
    }
