"""What goes wrong in one rank of a run, for real, at a step that the environment names."""

from __future__ import annotations

import os
import random
import signal
import time
import warnings
from pathlib import Path
from typing import Any

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

FAULT = "FAULT"  # kind:rank:step, or kind:rank:step:stage, or once:rank:step:file


class FaultyTask(SupervisedTask):
    """Does what `FAULT` says."""

    done = 0

    def train_step(self, batch: Nested) -> StepOutput:
        self.at("train")
        return super().train_step(batch)

    def eval_step(self, stage: str, batch: Nested) -> StepOutput:
        self.at(stage)
        return super().eval_step(stage, batch)

    def at(self, stage: str) -> None:
        kind, where, step, *rest = os.environ[FAULT].split(":")
        if kind == "once":
            kind, rest = ("none" if Path(rest[0]).exists() else "raise"), []
        if stage != (rest[0] if rest else "train"):
            return
        self.done += 1
        time.sleep(float(os.environ.get("SLOW", "0")))
        if "MARK" in os.environ and rank() == 0:
            with Path(os.environ["MARK"]).open("a") as file:
                file.write(f"{stage} {self.done}\n")
        if kind == "slow":
            time.sleep(float(step))
        elif rank() == int(where) and self.done == int(step):
            if os.environ[FAULT].startswith("once"):
                Path(os.environ[FAULT].split(":")[3]).touch()
            do(kind)


class Greedy(SupervisedTask):
    """Needs more memory than there is for batches above a size, and some time for any."""

    def __init__(self, *given: Any, largest: int = 10**6, pause: float = 0.0, **named: Any) -> None:
        super().__init__(*given, **named)
        self.largest, self.pause = largest, pause

    def forward(self, inputs: Nested) -> Nested:
        time.sleep(self.pause)
        if len(inputs) > self.largest:
            torch.empty(1 << 50)
        return super().forward(inputs)


class Normed(nn.Sequential):
    """Normalises batches; what it is given beside is that of an MLP."""

    def __init__(self, **_: object) -> None:
        super().__init__(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


class Numbered(Dataset[tuple[torch.Tensor, int]]):
    """Samples that are read one by one."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if os.environ[FAULT] == f"data:{rank()}:{index}":
            raise OSError("the file broke")
        return torch.rand(4), index % 2


class Indexed(Dataset[tuple[torch.Tensor, int]]):
    """Samples that begin with their own number and go on at random."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.cat([torch.tensor([float(index)]), torch.rand(3)]), index % 2


class RecordedTask(FaultyTask):
    """Writes down which samples it learns from, into the file that `IDS` names."""

    def train_step(self, batch: Nested) -> StepOutput:
        step = super().train_step(batch)
        with Path(f"{os.environ['IDS']}{rank()}").open("a") as file:
            file.write(f"{' '.join(map(str, batch[0][:, 0].long().tolist()))}\n")
        return step


class Drawing(Callback):
    """Draws random numbers where the run does, too."""

    def on_step_end(self, step: StepEnd) -> None:  # noqa: ARG002
        self.drawn = (random.random(), np.random.rand(), torch.rand(1))


class Tainted(Dataset[tuple[torch.Tensor, int]]):
    """Samples of which one may be no number."""

    def __init__(self, count: int, bad: int | None) -> None:
        self.inputs = torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
        self.targets = (self.inputs[:, 0] > 0).long().tolist()
        if bad is not None:
            self.inputs[bad] = torch.nan

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.inputs[index], self.targets[index]


class FaultyCallback(Callback):
    """Fails in rank 0, where the others do not look."""

    def on_epoch_end(self, end: EpochEnd) -> None:  # noqa: ARG002
        raise RuntimeError("the watcher broke")


class SlowEnd(Callback):
    """Takes its time in the end."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.seconds = folder, seconds

    def on_run_end(self, history: History) -> None:  # noqa: ARG002
        time.sleep(self.seconds)
        (self.folder / "ended").touch()


def do(kind: str) -> None:
    """Let it happen."""
    if kind == "raise":
        raise RuntimeError("the rank broke")
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
        warnings.warn("the rank is uneasy", stacklevel=1)
    if kind in ("SIGTERM", "SIGUSR1", "SIGINT"):
        os.kill(os.getpid(), getattr(signal, kind))
