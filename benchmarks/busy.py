"""Measure training on an idle machine, and beside another process that needs a core.

    python -m benchmarks.busy

Training is compared with a bare loop with the threads of torch's defaults, on the same data in
memory. Each side is a process of its own; they take turns for several rounds, in an order that
alternates, first alone and then beside one process that never waits. Start it on a machine that
does nothing else: the load average is in the notes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from app.runtime.wait_policy import SLEEP_SECONDS, adaptive_wait_policy
from benchmarks.overhead import (
    PLAIN,
    Side,
    Summary,
    alternate,
    bare_epoch,
    our_epoch,
    summarize,
)
from benchmarks.tables import Table, add_output_option, publish

EPOCHS = 3  # in a row; the time until the other process is noticed is a part of theirs
MODELS: dict[str, tuple[str, ...]] = {
    "3 x 100 steps, MLP 784-128-10": ("model=mlp", "trainer.limit_train_batches=100"),
    "3 x 10 steps, CNN": ("model=cnn", "trainer.limit_train_batches=10"),
    "3 x 5 steps, AlexNet": ("model=alexnet", "trainer.limit_train_batches=5"),
}
TARGETS = {"idle": "<= 1.05", "busy": "<= 0.33 for the MLP"}
NEVER_WAIT = """
import os
parent = os.getppid()
while os.getppid() == parent:
    pass
"""
UNTIL_EXIT = ExitStack()


def our_epochs(folder: Path, overrides: tuple[str, ...]) -> Callable[[], int]:
    """Return several of our epochs, under the wait policy of a run."""
    UNTIL_EXIT.enter_context(adaptive_wait_policy())
    return repeat(our_epoch(folder, overrides))


def bare_epochs(overrides: tuple[str, ...]) -> Callable[[], int]:
    return repeat(bare_epoch(overrides, is_fused=False))


def repeat(epoch: Callable[[], int]) -> Callable[[], int]:
    return lambda: sum(epoch() for _ in range(EPOCHS))


@contextmanager
def busy_process() -> Iterator[None]:
    """Run a process that never waits, in a session of its own like that of another terminal."""
    process = subprocess.Popen([sys.executable, "-c", NEVER_WAIT], start_new_session=True)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def rows_of(folder: Path, name: str, rounds: int, busy_rounds: int) -> list[dict[str, Any]]:
    """Measure a model on the machine as it is, and beside a busy process."""
    overrides = (*PLAIN, *MODELS[name])
    sides = {
        "ours": Side(our_epochs, folder, overrides),
        "bare loop": Side(bare_epochs, overrides),
    }
    measures = {side: process.seconds for side, process in sides.items()}
    results: dict[str, Summary] = {}
    times = alternate(rounds, measures)
    results["idle"] = summarize(times["ours"], times["bare loop"])
    with busy_process():
        times = alternate(busy_rounds, measures)
    results["busy"] = summarize(times["ours"], times["bare loop"])
    for process in sides.values():
        process.close()
    return [
        {"benchmark": f"{name} (s)", "machine": machine, **result, "target": TARGETS[machine]}
        for machine, result in results.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--busy-rounds", type=int, default=3)
    parser.add_argument("--models", nargs="*", help="parts of the names of the models to measure")
    add_output_option(parser)
    options = parser.parse_args()
    load, rows = os.getloadavg()[0], []
    with tempfile.TemporaryDirectory() as temp:
        for number, name in enumerate(MODELS):
            if options.models is None or any(part in name for part in options.models):
                folder = Path(temp) / str(number)
                rows += rows_of(folder, name, options.rounds, options.busy_rounds)
    notes = (
        f"{os.cpu_count()} cores; the load average was {load:.2f} before the start. The bare loop "
        "has the default optimizer and torch's threads. A busy machine has one other process at "
        "normal priority that never waits. Ratios are medians of rounds, with their quartiles. "
        f"While a process of ours trains, its threads sleep for at least {SLEEP_SECONDS:g} s after "
        "the cores were needed; that they are needed is noticed after half a second.",
    )
    publish([Table("busy", "Beside a busy process", rows, notes)], options.out)


if __name__ == "__main__":
    main()
