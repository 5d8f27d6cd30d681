"""Measure the time that the pool launcher saves and the overhead per job of a sweep.

    python -m benchmarks.sweep

Eight short jobs (an MLP on MNIST with eight seeds) run in three ways: with the pool launcher on two
slots, with Hydra's basic launcher, and as eight separate commands. The order rotates between
rounds. The script prints the median over the rounds and the median of the per-round ratios, because
absolute times on a shared machine say little.

- total: seconds from start to exit of the command or commands.
- overhead per job: seconds that a job spends outside training and evaluation, whose times come from
  its own tables. For the pool, the time from the start of the first job to the end of the last one,
  times two slots, is divided among the jobs.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import pandas as pd

from benchmarks.overhead import summarize
from benchmarks.tables import Table, add_output_option, publish

QUICK = ("--rounds", "1", "--epochs", "1")
SEEDS = range(8)
SLOTS = 2
OVERRIDES = ("model=mlp", "trainer.accelerator=cpu", "~callbacks.plots")


def run_app(folder: Path, *overrides: str) -> float:
    """Run the program; return the seconds it took."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "app", *overrides],
        cwd=folder,
        check=True,
        env={k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"},
        stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - start


def run_sweep(folder: Path, *overrides: str) -> float:
    """Run all jobs as one sweep; return the seconds it took."""
    seeds = ",".join(map(str, SEEDS))
    sweep = (f"seed={seeds}", f"hydra.sweep.dir={folder}/sweep")
    return run_app(folder, "-m", *sweep, *OVERRIDES, *overrides)


def run_commands(folder: Path, *overrides: str) -> float:
    """Run one command per job; return the seconds they took together."""
    return sum(
        run_app(folder, f"seed={seed}", f"hydra.run.dir={folder}/{seed}", *OVERRIDES, *overrides)
        for seed in SEEDS
    )


def compute_time(run_folder: Path) -> float:
    """Return seconds of training, validation and test."""
    return float(pd.read_csv(run_folder / "summary_table.csv")["epoch_time"].sum())


def pool_overhead(folder: Path) -> float:
    """Return the overhead per job of the pool in seconds."""
    lines = (folder / "sweep" / "sweep.log").read_text().splitlines()
    starts = [parse_time(line) for line in lines if re.search(r"job \d+ started", line)]
    ends = [parse_time(line) for line in lines if re.search(r"job \d+ completed", line)]
    runs = [path.parent for path in (folder / "sweep").glob("*/summary_table.csv")]
    assert len(starts) == len(ends) == len(runs) == len(SEEDS)
    wall = (max(ends) - min(starts)).total_seconds()
    return (SLOTS * wall - sum(map(compute_time, runs))) / len(SEEDS)


def command_overhead(folder: Path, seconds: float) -> float:
    """Return the overhead per job of separate commands in seconds."""
    computing = statistics.mean(compute_time(folder / str(seed)) for seed in SEEDS)
    return seconds / len(SEEDS) - computing


def parse_time(line: str) -> datetime:
    """Return when a line of the log was written."""
    return datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f")


def measure_round(epochs: int, number: int) -> dict[str, float]:
    """Measure one round; the order depends on its number."""
    overrides = (f"trainer.max_epochs={epochs}",)
    pool = ("hydra/launcher=pool", f"hydra.launcher.slots={SLOTS}")
    times: dict[str, float] = {}
    ways = ["pool", "basic", "commands"]
    for way in ways[number % 3 :] + ways[: number % 3]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if way == "commands":
                times[way] = run_commands(folder, *overrides)
                times["command overhead"] = command_overhead(folder, times[way])
            else:
                times[way] = run_sweep(folder, *overrides, *(pool if way == "pool" else ()))
            if way == "pool":
                times["pool overhead"] = pool_overhead(folder)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    add_output_option(parser)
    args = parser.parse_args()
    rounds = pd.DataFrame([measure_round(args.epochs, number) for number in range(args.rounds)])
    comparisons = [
        ("total (s)", "pool", "basic"),
        ("total (s)", "pool", "commands"),
        ("total (s)", "basic", "commands"),
        ("overhead per job (s)", "pool overhead", "command overhead"),
    ]
    rows = [
        {
            "benchmark": name,
            "way": ours,
            "baseline": theirs,
            **summarize([*rounds[ours]], [*rounds[theirs]]),
        }
        for name, ours, theirs in comparisons
    ]
    publish([Table("sweep", f"{len(SEEDS)} jobs, {SLOTS} slots", rows)], args.out)


if __name__ == "__main__":
    main()
