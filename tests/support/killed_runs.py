"""Runs that are killed repeatedly, compared with an undisturbed run."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from app.distributed.launch.failures import RankFailedError
from app.distributed.launch.local import LocalWorkers
from app.experiment.entry import run_experiment
from app.runtime.fault_injection import FAULT_VARIABLE
from app.training.checkpoint.header import verify_checksum
from app.training.checkpoint.store import read_store
from tests.support.processes import SILENT_LOGGING, assert_equal_runs, status_of
from tests.support.runs import job_for
from tests.support.warm import WarmCommand

# Everything that has a state: dropout, augmentation, momentum, averages, metrics in progress.
STATEFUL_RUN = (
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
    "before_move_old",
    "before_rename",
    "after_rename",
)
FILE_FAULT_POINTS = ("opened", "before_fsync", "after_fsync", "before_rename", "after_rename")
FAULTY_FILES = (
    "best.safetensors",
    "best-loss.safetensors",
    "model.pt",
    "epoch00",
    "summary_table.csv",
    "status.json",
    "start.json",
    "config.yaml",
)
EARLY_FAULTS = (  # before the first checkpoint, in the order of a run
    "opened:start.json:1",
    "after_rename:start.json:1",
    "opened:config.yaml:1",
    "before_rename:config.yaml:1",
    "after_rename:config.yaml:1",
    "opened:status.json:1",
    "opened:epoch001_train.csv:1",
    "after_rename:best.safetensors:1",
    "opened:last.safetensors:1",
    "before_rename:last.safetensors:1",
)
FAULT_POINTS = [f"{point}:last.safetensors" for point in CHECKPOINT_FAULT_POINTS] + [
    f"{point}:{file}" for file in FAULTY_FILES for point in FILE_FAULT_POINTS
]


@dataclass(frozen=True)
class Kill:
    """How to end a run: at a fault point, or by a signal after some seconds.

    Attributes:
        fault: Fault point as `app.runtime.fault_injection` reads it; empty to send a signal.
        seconds: When to send the signal, from the start of the process.
        signum: Signal to send.
    """

    fault: str = ""
    seconds: float = 0.0
    signum: int = signal.SIGKILL


def plan_kills(count: int, seed: int, duration: float, signum: int = signal.SIGKILL) -> list[Kill]:
    """Plan kills, alternately at a random time and at a fault point; every point gets its turn.

    Args:
        count: Number of kills.
        seed: Seed of the random choices.
        duration: Seconds that a run takes; signals are sent in its first two thirds.
        signum: Signal to send. Only SIGKILL is combined with fault points.
    """
    rng, points = random.Random(seed), list(FAULT_POINTS)
    rng.shuffle(points)
    planned = []
    for index in range(count):
        if index % 2 and signum == signal.SIGKILL:
            point = points[index // 2 % len(points)]
            planned.append(Kill(f"{point}:{rng.randint(1, 3)}"))
        else:
            planned.append(Kill(seconds=rng.uniform(0.1, 2 / 3) * duration, signum=signum))
    return planned


def run_command(cwd: Path, overrides: Iterable[str], kill: Kill | None = None) -> int:
    """Run `python -m app` with the options of the run, and return the exit code."""
    return run_arguments(cwd, [*STATEFUL_RUN, *overrides], kill)


def run_arguments(cwd: Path, arguments: Sequence[str], kill: Kill | None = None) -> int:
    """Run `python -m app` and return the exit code of the process."""
    fault = {FAULT_VARIABLE: kill.fault} if kill and kill.fault else {}
    running = WarmCommand(cwd, arguments, {**fault, "OMP_NUM_THREADS": "1"})
    if kill and kill.seconds:
        running.process.join(kill.seconds)
        running.send_signal(kill.signum)
    (cwd / "output").write_text(running.communicate(120)[0])
    assert running.returncode is not None
    return running.returncode


def run_two_ranks(cwd: Path, overrides: Iterable[str], kill: Kill | None = None) -> int:
    """Run a job on two ranks; a fault point kills rank 0."""
    job = job_for(*STATEFUL_RUN, "trainer.devices=2", f"hydra.run.dir={cwd / 'run'}", *overrides)
    (cwd / "run").mkdir(exist_ok=True)
    fault = {FAULT_VARIABLE: kill.fault} if kill and kill.fault else {}
    workers = LocalWorkers(run_experiment, job, cwd / "run", 2, SILENT_LOGGING, fault)
    try:
        workers.run()
    except RankFailedError as failed:
        assert "SIGKILL" in str(failed), failed.failure.trace
        return -signal.SIGKILL
    finally:
        workers.kill()
    return 0


def assert_readable(folder: Path) -> None:
    """Check that no file with a final name is incomplete."""
    for path in folder.rglob("*.csv"):
        pd.read_csv(path)
    for path in folder.rglob("*.json"):
        json.loads(path.read_text())
    for path in folder.glob("checkpoints/*.safetensors"):
        verify_checksum(path)
    if (folder / "model.pt").exists():
        torch.load(folder / "model.pt", weights_only=True)


def assert_same_outcome(expected: Path, actual: Path, compare_older: bool = True) -> None:
    """Check that two runs have the same files with the same content, except for times.

    Args:
        expected: The undisturbed run.
        actual: The run that was ended repeatedly.
        compare_older: Whether to compare `last-1` and `last-2`, too. A run that saves on a signal
            has others.
    """
    assert_equal_runs(expected, actual)
    names, found = (
        {path.name for path in folder.glob("checkpoints/*.safetensors")}
        for folder in (expected, actual)
    )
    assert found == names
    for name in names if compare_older else names - {"last-1.safetensors", "last-2.safetensors"}:
        one, other = (read_store(folder / "checkpoints" / name)[1] for folder in (expected, actual))
        assert one["epoch"] == other["epoch"], name
        assert all(torch.equal(one["model"][key], other["model"][key]) for key in one["model"])
    assert not [*actual.rglob(".*.part")]
    one, other = status_of(expected), status_of(actual)
    assert (other["status"], other["best"]) == ("completed", one["best"])


def wait_for_file(path: Path, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)
