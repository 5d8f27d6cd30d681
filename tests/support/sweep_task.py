"""A task for jobs of sweeps that can fail at a given step, while the file `BROKEN` exists."""

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
    """Fails at a given training step, and records every step in the file `MARK`.

    Args:
        fault: nothing | raise | memory | kill | hang.
        fault_step: Training step at which it happens, counted from 1 over all epochs.
        step_seconds: Additional duration of each step.
        wait_for_processes: Number of processes, including this one, that must have made a step
            before the first step ends.
        **kwargs: Arguments of `SupervisedTask`.
    """

    def __init__(
        self,
        fault: str = "nothing",
        fault_step: int = 15,
        step_seconds: float = 0.0,
        wait_for_processes: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.fault, self.fault_step = fault, fault_step
        self.step_seconds, self.num_processes = step_seconds, wait_for_processes
        self.num_steps = 0

    def train_step(self, batch: Nested) -> StepOutput:
        self.num_steps += 1
        time.sleep(self.step_seconds)
        if "MARK" in os.environ:
            with Path(os.environ["MARK"]).open("a") as file:
                file.write(f"{os.getpid()} {os.environ.get('OMP_NUM_THREADS')}\n")
        if self.num_steps == 1:
            wait_for_processes(self.num_processes)
        is_broken = Path(os.environ.get("BROKEN", "/nowhere")).exists()
        if self.num_steps == self.fault_step and is_broken:
            trigger_fault(self.fault)
        return super().train_step(batch)


def wait_for_processes(count: int, timeout: float = 120) -> None:
    """Wait until that number of processes have made a step."""
    deadline = time.monotonic() + timeout
    while count > 1 and len(started_pids()) < count:
        if time.monotonic() > deadline:
            raise RuntimeError(f"only {len(started_pids())} of {count} processes have started")
        time.sleep(0.02)


def started_pids() -> set[str]:
    """Return the PIDs of the processes that have made a step."""
    return {line.split()[0] for line in Path(os.environ["MARK"]).read_text().splitlines()}


def trigger_fault(fault: str) -> None:
    if fault == "raise":
        raise RuntimeError("the step broke")
    if fault == "memory":
        torch.empty(2**50)
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    while fault == "hang":
        time.sleep(1)
