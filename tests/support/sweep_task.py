"""Jobs of a sweep in which things go wrong for real, as long as the file `BROKEN` is there."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch

from app.runtime.nested import Nested
from app.training.supervised import SupervisedTask
from app.training.task import StepOutput


class SweepTask(SupervisedTask):
    """Does at one of its steps what it is told.

    Args:
        does: nothing | raise | memory | kill | hang.
        at: The step of training, counted from 1 over all epochs.
        slow: Seconds that each step takes longer.
        meets: Processes, this one among them, that must have begun before the first step ends.
        **parts: As those of the task it is made from.
    """

    def __init__(
        self,
        does: str = "nothing",
        at: int = 15,
        slow: float = 0.0,
        meets: int = 0,
        **parts: Any,
    ) -> None:
        super().__init__(**parts)
        self.does, self.at, self.slow, self.meets = does, at, slow, meets
        self.done = 0

    def train_step(self, batch: Nested) -> StepOutput:
        self.done += 1
        time.sleep(self.slow)
        if "MARK" in os.environ:
            with Path(os.environ["MARK"]).open("a") as file:
                file.write(f"{os.getpid()} {os.environ.get('OMP_NUM_THREADS')}\n")
        if self.done == 1:
            wait_for_processes(self.meets)
        if self.done == self.at and Path(os.environ.get("BROKEN", "/nowhere")).exists():
            trigger_fault(self.does)
        return super().train_step(batch)


def wait_for_processes(count: int, patience: float = 120) -> None:
    """Waits for the first steps of other processes."""
    end = time.monotonic() + patience
    while count > 1 and len(started_pids()) < count:
        if time.monotonic() > end:
            raise RuntimeError(f"of {count} processes only {len(started_pids())} have begun")
        time.sleep(0.02)


def started_pids() -> set[str]:
    """The processes that have made a step."""
    return {line.split()[0] for line in Path(os.environ["MARK"]).read_text().splitlines()}


def trigger_fault(what: str) -> None:
    if what == "raise":
        raise RuntimeError("the step broke")
    if what == "memory":
        torch.empty(2**50)
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    while what == "hang":
        time.sleep(1)
