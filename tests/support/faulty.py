"""Tasks, datasets and callbacks that fail in one rank of a run, as environment variables say."""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time
import warnings
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from app.distributed.collectives import rank
from app.runtime.nested import Nested
from app.training.events import Callback, EpochEnd, StepEnd
from app.training.history import History
from app.training.supervised import SupervisedTask
from app.training.task import StepOutput

# kind:rank:step, kind:rank:step:stage, or once:rank:step:file (raises unless the file exists)
FAULT_VARIABLE = "FAULT"


class FaultyTask(SupervisedTask):
    """Fails at the step of the rank that `FAULT` names.

    Each step sleeps for `SLOW` seconds; rank 0 appends a line per step to the file `MARK`.
    """

    num_steps = 0

    def train_step(self, batch: Nested) -> StepOutput:
        self.maybe_fail("train")
        return super().train_step(batch)

    def eval_step(self, stage: str, batch: Nested) -> StepOutput:
        self.maybe_fail(stage)
        return super().eval_step(stage, batch)

    def maybe_fail(self, stage: str) -> None:
        kind, faulty_rank, step, *rest = os.environ[FAULT_VARIABLE].split(":")
        if kind == "once":
            kind, rest = ("none" if Path(rest[0]).exists() else "raise"), []
        if stage != (rest[0] if rest else "train"):
            return
        self.num_steps += 1
        time.sleep(float(os.environ.get("SLOW", "0")))
        if "MARK" in os.environ and rank() == 0:
            with Path(os.environ["MARK"]).open("a") as file:
                file.write(f"{stage} {self.num_steps}\n")
        if kind == "slow":
            time.sleep(float(step))
        elif rank() == int(faulty_rank) and self.num_steps == int(step):
            if os.environ[FAULT_VARIABLE].startswith("once"):
                Path(os.environ[FAULT_VARIABLE].split(":")[3]).touch()
            trigger_fault(kind)


def trigger_fault(kind: str) -> None:
    """Make this process fail in the given way."""
    if kind == "raise":
        raise RuntimeError("injected failure")
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if kind == "hang":
        time.sleep(1000)
    if kind == "exit":
        os._exit(7)
    if kind == "memory":
        torch.empty(1 << 50)
    if kind == "warn":
        warnings.warn("injected warning", stacklevel=1)
    if kind == "clock":
        set_clock_back(timedelta(days=1))
    if kind in ("SIGTERM", "SIGUSR1", "SIGINT"):
        os.kill(os.getpid(), getattr(signal, kind))


def set_clock_back(difference: timedelta) -> None:
    """Set the clock back for the rest of this process, as far as this program reads it."""
    now = time.time

    class EarlierDatetime(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return super().now(tz) - difference

    time.time = lambda: now() - difference.total_seconds()  # type: ignore[assignment]
    for name, module in [*sys.modules.items()]:
        if name.startswith("app.") and hasattr(module, "datetime"):
            module.datetime = EarlierDatetime


class MemoryRecorder(Callback):
    """Appends the resident memory of this process to `memory.csv` after every `every` steps."""

    def __init__(self, folder: Path, every: int) -> None:
        self.path, self.every, self.steps = folder / "memory.csv", every, 0
        self.path.write_text("step,bytes\n")

    def on_step_end(self, step: StepEnd) -> None:  # noqa: ARG002
        self.steps += 1
        if self.steps % self.every == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            with self.path.open("a") as file:
                file.write(f"{self.steps},{pages * resource.getpagesize()}\n")


class RecordedTask(FaultyTask):
    """Appends the sample numbers of each training step to the file that `IDS` names."""

    def train_step(self, batch: Nested) -> StepOutput:
        step = super().train_step(batch)
        with Path(f"{os.environ['IDS']}{rank()}").open("a") as file:
            file.write(f"{' '.join(map(str, batch[0][:, 0].long().tolist()))}\n")
        return step


class MemoryHungryTask(SupervisedTask):
    """Runs out of memory on batches larger than `largest`, and sleeps in each forward pass."""

    def __init__(self, *args: Any, largest: int = 10**6, pause: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.largest, self.pause = largest, pause

    def forward(self, inputs: Nested) -> Nested:
        time.sleep(self.pause)
        if len(inputs) > self.largest:
            torch.empty(1 << 50)
        return super().forward(inputs)


class BatchNormMLP(nn.Sequential):
    """MLP with batch normalization; ignores the arguments that `model=mlp` passes."""

    def __init__(self, **_: object) -> None:
        super().__init__(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


class FaultyDataset(Dataset[tuple[torch.Tensor, int]]):
    """Random samples, one of which cannot be read in one rank (`FAULT=data:rank:index`).

    With `FAULT=block:rank:index`, reading it never ends.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if os.environ[FAULT_VARIABLE] == f"data:{rank()}:{index}":
            raise OSError("injected read failure")
        if os.environ[FAULT_VARIABLE] == f"block:{rank()}:{index}":
            time.sleep(1000)
        return torch.rand(4), index % 2


class IndexedDataset(Dataset[tuple[torch.Tensor, int]]):
    """Samples whose first value is their index; the other values are random."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.cat([torch.tensor([float(index)]), torch.rand(3)]), index % 2


class NaNDataset(Dataset[tuple[torch.Tensor, int]]):
    """Random samples, one of which may be NaN."""

    def __init__(self, count: int, bad: int | None) -> None:
        self.inputs = torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
        self.targets = (self.inputs[:, 0] > 0).long().tolist()
        if bad is not None:
            self.inputs[bad] = torch.nan

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.inputs[index], self.targets[index]


class RandomDrawCallback(Callback):
    """Draws from the global random generators after each step."""

    def on_step_end(self, step: StepEnd) -> None:  # noqa: ARG002
        self.drawn = (random.random(), np.random.rand(), torch.rand(1))


class FaultyCallback(Callback):
    """Fails in rank 0, while the other ranks have no callbacks."""

    def on_epoch_end(self, end: EpochEnd) -> None:  # noqa: ARG002
        raise RuntimeError("injected callback failure")


class SlowCallback(Callback):
    """Takes some time at the end of the run, and then creates a file."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.seconds = folder, seconds

    def on_run_end(self, history: History) -> None:  # noqa: ARG002
        time.sleep(self.seconds)
        (self.folder / "ended").touch()
