"""A run that is killed again and again, beside one that is left alone."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from app.distributed.launch.failures import RankFailedError
from app.distributed.launch.local import LocalWorkers
from app.runtime.fault_injection import VARIABLE
from app.training.checkpoint.checksum import verify_checksum
from tests.support.processes import SILENT, assert_equal_runs, status_of
from tests.support.runs import job_for
from tests.support.warm import WarmCommand

STATEFUL_RUN = (  # whatever has a state: dropout, augmentation, momenta, averages, metrics in flight
    "model=mlp",
    "model.dropout=0.1",
    "+data.augment.erase={_target_: torchvision.transforms.v2.RandomErasing, p: 0.5}",
    "trainer.max_epochs=3",
    "trainer.limit_train_batches=10",
    "trainer.limit_valid_batches=3",
    "trainer.limit_test_batches=2",
    "trainer.accumulate_grad_batches=2",
    "average=ema",
    "average.decay=0.9",
    "scheduler.warmup_steps=4",
    "metric/single@metric.train=[accuracy,auroc]",
    "checkpoint.every_n_steps=2",
    "checkpoint.keep_last=3",
    "checkpoint.save_top_k=2",
    "+checkpoint.monitors.loss={metric: loss, mode: min}",
    "goal.patience=5",
    "~callbacks.plots",
)
CHECKPOINT_FAULT_POINTS = (
    "opened",
    "mid_write",
    "before_fsync",
    "after_fsync",
    "before_old_moves",
    "before_rename",
    "after_rename",
)
FILE_FAULT_POINTS = ("opened", "before_fsync", "after_fsync", "before_rename", "after_rename")
FAULTY_FILES = (
    "best.pt",
    "best-loss.pt",
    "model.pt",
    "epoch00",
    "summary_table.csv",
    "status.json",
    "config.yaml",
)
FAULT_POINTS = [f"{place}:last.pt" for place in CHECKPOINT_FAULT_POINTS] + [
    f"{place}:{file}" for file in FAULTY_FILES for place in FILE_FAULT_POINTS
]


@dataclass(frozen=True)
class Kill:
    """How a run is ended: at a fault point, or by a signal after so many seconds.

    Attributes:
        fault: As `app.runtime.fault_injection` reads it; empty where a signal comes.
        seconds: From the start of the process.
        number: Of the signal.
    """

    fault: str = ""
    seconds: float = 0.0
    number: int = signal.SIGKILL


def plan_kills(count: int, seed: int, length: float, number: int = signal.SIGKILL) -> list[Kill]:
    """Half of them at fault points, all of which have their turn, half of them at any time.

    Args:
        count: How many.
        seed: Of what is drawn.
        length: Seconds that a run takes; a signal comes in the first two thirds of it.
        number: Of the signal.
    """
    draw, points = random.Random(seed), list(FAULT_POINTS)
    draw.shuffle(points)
    found = []
    for place in range(count):
        if place % 2 and number == signal.SIGKILL:
            point = points[place // 2 % len(points)]
            found.append(Kill(f"{point}:{draw.randint(1, 3)}"))
        else:
            found.append(Kill(seconds=draw.uniform(0.1, 2 / 3) * length, number=number))
    return found


def run_command(cwd: Path, words: Iterable[str], kill: Kill | None = None) -> int:
    """Runs `python -m app` with those words; gives how the process has ended."""
    fault = {VARIABLE: kill.fault} if kill and kill.fault else {}
    running = WarmCommand(cwd, [*STATEFUL_RUN, *words], {**fault, "OMP_NUM_THREADS": "1"})
    if kill and kill.seconds:
        running.process.join(kill.seconds)
        running.send_signal(kill.number)
    (cwd / "told").write_text(running.communicate(120)[0])
    assert running.returncode is not None
    return running.returncode


def run_two_ranks(cwd: Path, words: Iterable[str], kill: Kill | None = None) -> int:
    """Runs it on two ranks; a fault point kills rank 0."""
    job = job_for(*STATEFUL_RUN, "trainer.devices=2", f"hydra.run.dir={cwd / 'run'}", *words)
    fault = {VARIABLE: kill.fault} if kill and kill.fault else {}
    crew = LocalWorkers(job, cwd / "run", 2, SILENT, fault)
    try:
        crew.run()
    except RankFailedError as failed:
        assert "SIGKILL" in str(failed), failed.failure.trace
        return -signal.SIGKILL
    finally:
        crew.kill()
    return 0


def assert_readable(folder: Path) -> None:
    """Nothing that has a good name is torn."""
    for path in folder.rglob("*.csv"):
        pd.read_csv(path)
    for path in folder.rglob("*.json"):
        json.loads(path.read_text())
    for path in folder.glob("checkpoints/*.pt"):
        verify_checksum(path)
    if (folder / "model.pt").exists():
        torch.load(folder / "model.pt", weights_only=True)


def assert_same_outcome(whole: Path, found: Path, older: bool = True) -> None:
    """The same files with the same in them, but for times.

    Args:
        whole: The run that nobody disturbed.
        found: The one that was ended again and again.
        older: States before the last are the same, too; a signal to save puts others there.
    """
    assert_equal_runs(whole, found)
    names = {path.name for path in (whole / "checkpoints").iterdir()}
    assert {path.name for path in (found / "checkpoints").iterdir()} == names
    for name in names if older else names - {"last-1.pt", "last-2.pt"}:
        one, other = (
            torch.load(folder / "checkpoints" / name, weights_only=True)
            for folder in (whole, found)
        )
        assert one["epoch"] == other["epoch"], name
        assert all(torch.equal(one["model"][key], other["model"][key]) for key in one["model"])
    assert not [*found.rglob(".*.part")]
    one, other = status_of(whole), status_of(found)
    assert (other["status"], other["best"]) == ("completed", one["best"])


def wait_for_file(path: Path, seconds: float = 60.0) -> None:
    """It is there."""
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until, path
        time.sleep(0.01)
