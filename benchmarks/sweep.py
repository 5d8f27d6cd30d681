"""What the pool saves, and what a job of a sweep costs.

    python benchmarks/sweep.py

Eight short jobs, an MLP on MNIST with eight seeds, in three ways: by the pool with two slots, by
Hydra's basic launcher, and as eight commands one after the other. They take turns in each round;
medians of rounds and of their ratios are printed, since absolute times on a shared machine say
little.

- whole: seconds from the command to its end.
- a job's cost: seconds that a job takes beside its training and its evaluation, as its own tables
  have them; of the pool the time between the first job's beginning and the last one's end, times
  two slots, shared out over the jobs.
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

SEEDS = range(8)
SLOTS = 2
WORDS = ("model=mlp", "trainer.accelerator=cpu", "~callbacks.plots")


def run(folder: Path, *words: str) -> float:
    """The program; gives the seconds that it took."""
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "app", *words],
        cwd=folder,
        check=True,
        env={k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"},
        stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - began


def sweep(folder: Path, *words: str) -> float:
    """All jobs by one command."""
    seeds = ",".join(map(str, SEEDS))
    return run(folder, "-m", f"seed={seeds}", f"hydra.sweep.dir={folder}/sweep", *WORDS, *words)


def commands(folder: Path, *words: str) -> float:
    """A command for each job."""
    return sum(
        run(folder, f"seed={seed}", f"hydra.run.dir={folder}/{seed}", *WORDS, *words)
        for seed in SEEDS
    )


def learning(run: Path) -> float:
    """Seconds of training, validation and test."""
    return float(pd.read_csv(run / "summary_table.csv")["epoch_time"].sum())


def cost_in_pool(folder: Path) -> float:
    """Seconds that a job takes beside what it is there for."""
    lines = (folder / "sweep" / "sweep.log").read_text().splitlines()
    begun = [moment(line) for line in lines if re.search(r"job \d+ begins", line)]
    ended = [moment(line) for line in lines if re.search(r"job \d+ completed", line)]
    runs = [path.parent for path in (folder / "sweep").glob("*/summary_table.csv")]
    assert len(begun) == len(ended) == len(runs) == len(SEEDS)
    wall = (max(ended) - min(begun)).total_seconds()
    return (SLOTS * wall - sum(map(learning, runs))) / len(SEEDS)


def cost_alone(folder: Path, seconds: float) -> float:
    """The same of commands one after the other."""
    return seconds / len(SEEDS) - statistics.mean(learning(folder / str(seed)) for seed in SEEDS)


def moment(line: str) -> datetime:
    """At which a line of the log was written."""
    return datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f")


def measured(epochs: int, number: int) -> dict[str, float]:
    """One round, in an order of its own."""
    words = (f"trainer.max_epochs={epochs}",)
    pool = ("hydra/launcher=pool", f"hydra.launcher.slots={SLOTS}")
    found: dict[str, float] = {}
    ways = ["pool", "basic", "commands"]
    for way in ways[number % 3 :] + ways[: number % 3]:
        with tempfile.TemporaryDirectory() as text:
            folder = Path(text)
            if way == "commands":
                found[way] = commands(folder, *words)
                found["cost of a command"] = cost_alone(folder, found[way])
            else:
                found[way] = sweep(folder, *words, *(pool if way == "pool" else ()))
            if way == "pool":
                found["cost in the pool"] = cost_in_pool(folder)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()
    rounds = pd.DataFrame([measured(args.epochs, number) for number in range(args.rounds)])
    pairs = [
        ("whole (s)", "pool", "basic"),
        ("whole (s)", "pool", "commands"),
        ("whole (s)", "basic", "commands"),
        ("a job's cost (s)", "cost in the pool", "cost of a command"),
    ]
    lines = [
        [
            what,
            ours,
            theirs,
            *rounds[[ours, theirs]].median(),
            (rounds[ours] / rounds[theirs]).median(),
        ]
        for what, ours, theirs in pairs
    ]
    table = pd.DataFrame(lines, columns=["what", "ours", "against", "ours ", "theirs", "ratio"])
    print(table.to_string(index=False, float_format=lambda value: f"{value:,.3f}"))


if __name__ == "__main__":
    main()
