"""Compare an epoch with that of a bare loop and of other training libraries.

    pip install -e ".[benchmarks]"
    python -m benchmarks.peers
    python -m benchmarks.peers --models MLP --peers Lightning Keras --rounds 3

All sides train the same model with the same optimizer options, batch size and number of threads, on
the CPU, and record the loss and the accuracy of every iteration where they can. There are two ways:

- in memory: the digits are bytes in memory. All sides but ours get the same iterable, which indexes
  and normalizes a batch as a good bare loop does; all have a fused optimizer and, for the CNN,
  channels-last memory, which ours chooses by itself. What differs is the loop alone.
- as in tutorials: each reads the data as its own quickstart does, with torch's default optimizer;
  ours is `python -m app model=mlp data=mnist`.

Each side is a process of its own and trains one epoch after the other; they take turns for several
rounds, in an order that alternates. An epoch lasts until the next one begins, so that what is done
at its end counts, whereas starting up and the first epoch do not. Ratios are those of a round.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing as mp
import os
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.overhead import FakeTerminal, alternate, torchvision_mnist
from benchmarks.peer_loops import BARE, BATCH_SIZE, IN_MEMORY, SIDES, STEPS, Work
from benchmarks.tables import Table, add_output_option, publish, skip

QUICK = ("--rounds", "1", "--models", "MLP")
Row = dict[str, Any]
NOTES = (
    f"Seconds of an epoch of steps of {BATCH_SIZE} digits, and ratios to the bare loop of the same "
    "round: medians and quartiles.",
    "Keras has an AdamW of its own, which is not fused; the running means that Keras and "
    "torchmanager give to callbacks begin again in each epoch; torchmanager 1.5 cannot build the "
    "accuracy of its README (`SparseCategoricalAccuracy()` refuses its own default), so it gets a "
    "function.",
    "Not here: timm, whose training loop is a script of its repository (`train.py`) and not part "
    "of the package, and takes neither this model nor data in memory; TorchExpManager, which is "
    "not a package that can be installed.",
)


class Process:
    """A process that trains, an epoch at a time.

    Args:
        side: Name of the side.
        model: `MLP` or `CNN`.
        way: `in memory` or `as in tutorials`.
        mnist: Folder with the files that torchvision reads.
        folder: What the process writes goes here.
    """

    def __init__(self, side: str, model: str, way: str, mnist: Path, folder: Path) -> None:
        folder.mkdir(parents=True)
        context = mp.get_context("spawn")
        self.side = side
        self.connection, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, side, model, way, mnist, folder))

    def __enter__(self) -> Self:
        self.process.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.kill()  # Lightning handles SIGTERM, and would go on
        self.process.join()

    def seconds(self) -> float:
        """Train an epoch and return how long it took."""
        self.connection.send("go on")
        answer = self.connection.recv()
        if isinstance(answer, str):
            raise RuntimeError(f"{self.side}: {answer}")
        return float(answer)


def serve(
    connection: Connection, side: str, model: str, way: str, mnist: Path, folder: Path
) -> None:
    """Train for as long as there are requests; answer each with the seconds of an epoch."""
    sys.stdout = sys.stderr = FakeTerminal()
    warnings.simplefilter("ignore")
    logging.disable()
    os.chdir(folder)
    mp.set_start_method("fork", force=True)  # of workers; this process was spawned
    start: float | None = None

    def pace() -> None:
        nonlocal start
        if start is not None:
            connection.send(time.perf_counter() - start)
        connection.recv()
        start = time.perf_counter()

    try:
        SIDES[side].train(Work(model, way, mnist, pace, folder))
    except Exception:  # noqa: BLE001  # whatever it is, the other process reports it
        connection.send(traceback.format_exc())


def compare(model: str, way: str, sides: Sequence[str], rounds: int, folder: Path) -> list[Row]:
    """Measure all sides; return a row for each."""
    with ExitStack() as stack:
        processes = {
            name: stack.enter_context(
                Process(name, model, way, folder / "torchvision", folder / way / model / name)
            )
            for name in sides
        }
        times = alternate(rounds, {name: each.seconds for name, each in processes.items()})
    work = f"{model}, {STEPS[way][model]} steps"
    return [{"model": work, **describe(name, times[name], times[BARE])} for name in sides]


def describe(name: str, times: list[float], bare_times: list[float]) -> Row:
    side = SIDES[name]
    ratios = [one / bare for one, bare in zip(times, bare_times, strict=True)]
    return {
        "with": f"{name} {version(side.package)}" if side.package else name,
        "each iteration": side.records,
        "seconds": statistics.median(times),
        "quartiles": quartiles(times),
        "ratio": statistics.median(ratios),
        "quartiles of the ratio": quartiles(ratios),
    }


def quartiles(values: list[float]) -> str:
    if len(values) < 2:
        return ""
    low, _, high = statistics.quantiles(values, method="inclusive")
    return f"{low:.3f} to {high:.3f}"


def is_installed(side: str) -> bool:
    package = SIDES[side].package
    try:
        return package is None or bool(version(package))
    except PackageNotFoundError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", nargs="*", choices=STEPS[IN_MEMORY], default=["MLP", "CNN"])
    parser.add_argument("--ways", nargs="*", choices=STEPS, default=[*STEPS])
    parser.add_argument("--peers", nargs="*", choices=SIDES, default=[*SIDES])
    parser.add_argument("--threads", type=int, help="of each side; by default torch's number")
    add_output_option(parser)
    options = parser.parse_args()
    if options.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)  # for the processes of the sides
    sides = [name for name in SIDES if name == BARE or name in options.peers]
    missing = [name for name in sides if not is_installed(name)]
    if missing:
        skip(f'{", ".join(missing)}: not installed; pip install -e ".[benchmarks]"')
    tables = []
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        torchvision_mnist(folder / "torchvision")
        for way in options.ways:
            rows = [
                row
                for model in options.models
                for row in compare(model, way, sides, options.rounds, folder)
            ]
            name = f"peers_{way.replace(' ', '_')}"
            tables.append(Table(name, f"Training libraries, {way}", rows, NOTES))
    publish(tables, options.out)


if __name__ == "__main__":
    main()
