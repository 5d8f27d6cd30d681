"""What goes wrong in one rank of a run, for real, at a step that the environment names."""

from __future__ import annotations

import os
import signal
import time
import warnings

import torch

from app.callbacks.callback import Callback, EpochEnd
from app.distributed import rank
from app.nested import Nested
from app.task import Step, SupervisedTask

FAULT = "FAULT"  # kind:rank:step, or kind:rank:step:stage


class FaultyTask(SupervisedTask):
    """Does what `FAULT` says."""

    done = 0

    def train_step(self, batch: Nested) -> Step:
        self.at("train")
        return super().train_step(batch)

    def eval_step(self, stage: str, batch: Nested) -> Step:
        self.at(stage)
        return super().eval_step(stage, batch)

    def at(self, stage: str) -> None:
        kind, where, step, *rest = os.environ[FAULT].split(":")
        if stage != (rest[0] if rest else "train"):
            return
        self.done += 1
        if "MARK" in os.environ and rank() == 0:
            with open(os.environ["MARK"], "a") as file:
                file.write(f"{stage} {self.done}\n")
        if kind == "slow":
            time.sleep(float(step))
        elif rank() == int(where) and self.done == int(step):
            do(kind)


class FaultyCallback(Callback):
    """Fails in rank 0, where the others do not look."""

    def on_epoch_end(self, end: EpochEnd) -> None:
        raise RuntimeError("the watcher broke")


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
