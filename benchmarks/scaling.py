"""What several ranks give, and what they cost.

    python benchmarks/scaling.py

The program runs on the CPU with one thread to each rank, on two ranks and on one in turn; medians
of rounds and of their ratios are printed, since absolute times on a shared machine say little.
Three rounds took four and a half minutes on two cores that others used a little, too.

- training: images/s of AlexNet in the second epoch, the median of its steps, 2 ranks against 1.
  The batch is of 256 images in both, each rank has its share; a ratio of 2 is all there is to gain.
- launch: seconds from the command, a sweep of two jobs, to the first step of training in the last
  rank of the first one, 2 ranks against `launch=inline`.
- launch, 2nd of a sweep: from the last file of the first job to the first step of the second one.
  Python has started by then, and ranks come from a process that has torch already.
- evaluation: seconds of the MLP on all 10,000 test images, 2 ranks against 1. Its steps are so
  short that this shows what ranks have to tell each other.
- rows to the host: milliseconds of what is done with the sums of all those steps when the stage
  ends, in 2 ranks at once, with the `all_reduce` over both against without it.
- that all_reduce: what it adds, and as a share of the evaluation on 2 ranks.
- agreements: milliseconds of the messages, one to a step, by which ranks stop together, and as a
  share likewise. They are sent one upon the other here, while those of a run travel during the
  step; so this is the most that they can cost.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from app.distributed.collectives import LazyAllReduceMax, is_distributed
from app.distributed.launch.environment import ClusterEnvironment
from app.distributed.launch.worker import process_group
from app.training.accumulator import StepValues, average, to_host

Pair = tuple[float, float]  # with several ranks, and without
STEPS = 79  # in which the program goes through the 10,000 test images
REPEATS = 20  # in a round, of what takes milliseconds
BASIC = "hydra/sweeper=basic"  # names folders as it is told to
PLAIN = ("trainer.accelerator=cpu", "trainer.precision=fp32", "~callbacks.plots")
SHORT = ("trainer.max_epochs=1", "trainer.limit_train_batches=2", "trainer.limit_valid_batches=2")
TASK = """
import time

from app.distributed import rank
from app.task import SupervisedTask


class Noted(SupervisedTask):
    has_begun = False

    def train_step(self, batch):
        if not self.has_begun:
            self.has_begun = True
            with open("first_steps.csv", "a") as file:
                print(rank(), time.time(), sep=",", file=file)
        return super().train_step(batch)
"""


def run(folder: Path, *words: str) -> None:
    """The program; what it says of errors and warnings is seen."""
    subprocess.run(
        [sys.executable, "-m", "app", *words],
        cwd=folder,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )


def medians(pairs: Iterable[Pair]) -> list[float]:
    """Of both, and of the ratios of rounds."""
    triples = [(ours, theirs, ours / theirs) for ours, theirs in pairs]
    return [statistics.median(values) for values in zip(*triples, strict=True)]


def by_devices(
    folder: Path, rounds: int, read: Callable[[Path], float], *words: str
) -> list[float]:
    """What is read from the folders of runs on 2 ranks and on 1, both jobs of one command."""
    pairs = []
    for number in range(rounds):
        runs, order = Path(tempfile.mkdtemp(dir=folder)), "2,1" if number % 2 else "1,2"
        places = (f"hydra.sweep.dir={runs}", "hydra.sweep.subdir=${trainer.devices}")
        run(folder, "-m", BASIC, *words, *places, "launch=local", f"trainer.devices={order}")
        pairs.append((read(runs / "2"), read(runs / "1")))
    return medians(pairs)


def training_rates(folder: Path, rounds: int) -> list[float]:
    """Images/s of AlexNet."""
    words = (
        "model=alexnet",
        "data=mnist",
        "data.batch_size=256",
        "trainer.max_epochs=2",
        "trainer.limit_train_batches=24",
        "trainer.limit_valid_batches=2",
        "trainer.limit_test_batches=2",
    )

    def rate(folder: Path) -> float:
        steps = pd.read_csv(folder / "epoch_details" / "epoch002_train.csv")
        return float((steps["num_samples"] / steps["iter_time"]).median())

    return by_devices(folder, rounds, rate, *words, *PLAIN)


def evaluation_times(folder: Path, rounds: int) -> list[float]:
    """Seconds of the MLP on all test images."""
    run(folder, "model=mlp", *SHORT, *PLAIN, "hydra.run.dir=trained")

    def seconds(folder: Path) -> float:
        summary = pd.read_csv(folder / "test_summary_table.csv")
        assert summary["total_samples"].item() == 10_000
        return float(summary["epoch_time"].item())

    return by_devices(folder, rounds, seconds, "mode=test", "ckpt=trained")


def launch_times(folder: Path, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds until the first job of a sweep learns, and until the second does."""
    (folder / "first_step.py").write_text(TASK)
    starts, pairs = ["trainer.devices=2", "launch=inline"], []
    for number in range(rounds):
        order = starts[::-1] if number % 2 else starts
        waited = {start: waits(folder, start) for start in order}
        pairs.append(zip(waited[starts[0]], waited[starts[1]], strict=True))
    first, second = zip(*pairs, strict=True)
    return medians(first), medians(second)


def waits(folder: Path, start: str) -> tuple[float, float]:
    """Seconds from the command on, and from the last file of the first job on."""
    runs = Path(tempfile.mkdtemp(dir=folder))
    places = (f"hydra.sweep.dir={runs}", "hydra.sweep.subdir=${seed}")
    task = ("task._target_=first_step.Noted", "trusted_targets=[first_step]")
    began = time.time()
    run(folder, "-m", BASIC, "seed=0,1", "model=mlp", start, *SHORT, *PLAIN, *task, *places)
    first, second = first_steps(folder / "first_steps.csv")
    return first - began, second - (runs / "0" / "status.json").stat().st_mtime


def first_steps(notes: Path) -> list[float]:
    """When the last rank of each job came to its first step; the notes are gone then."""
    by_rank = pd.read_csv(notes, names=["rank", "time"]).groupby("rank")["time"]
    notes.unlink()
    return [max(times) for times in zip(*(list(times) for _, times in by_rank), strict=True)]


def talk_times(folder: Path, rounds: int) -> tuple[list[float], list[float]]:
    """Milliseconds of bringing rows to the host, and of agreeing after every step."""
    with mp.get_context("forkserver").Pool(2) as pool:
        of_rank = partial(talk, str(folder / "store"), rounds)
        first, _ = pool.map(of_rank, range(2), chunksize=1)
    rows, agreements = zip(*first, strict=True)
    return medians(rows), medians(agreements)


def talk(path: str, rounds: int, rank: int) -> list[tuple[Pair, Pair]]:
    """The same in one of two ranks: for each round, with the other and alone."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    torch.set_num_threads(1)
    store, world = FileStore(path, 2), ClusterEnvironment("local", rank, 2, rank, 2, "", 0)
    collect, found = partial(to_host, rows_of_a_stage()), []
    for number in range(rounds):
        theirs = milliseconds(collect), milliseconds(agree)
        with process_group(world, store, number, timeout=60):
            ours = milliseconds(collect), milliseconds(agree)
        found.append(((ours[0], theirs[0]), (ours[1], theirs[1])))
    return found


def rows_of_a_stage() -> list[StepValues]:
    """A loss, an accuracy's four states, and how many are right."""
    right = torch.tensor(60)
    return [
        {"loss": average(torch.rand(()), 64), "accuracy": (right,) * 4, "total_correct": (right,)}
        for _ in range(STEPS)
    ]


def agree() -> None:
    """After every step of a stage, to go on."""
    agreement = LazyAllReduceMax()
    for _ in range(STEPS):
        agreement(0)
    agreement.wait(0)


def milliseconds(action: Callable[[], object]) -> float:
    """The median of some; ranks begin each together."""
    times = []
    for _ in range(REPEATS):
        if is_distributed():
            dist.barrier()
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        training = training_rates(folder, rounds)
        launch, again = launch_times(folder, rounds)
        evaluation = evaluation_times(folder, rounds)
        rows, agreements = talk_times(folder, rounds)
    reduced, agreed, whole = rows[0] - rows[1], agreements[0], 1000 * evaluation[0]
    share = "evaluation, 2 ranks (ms)"
    lines = [
        ["training, AlexNet, batch 256 (images/s)", "1 rank", *training],
        ["launch (s)", "inline", *launch],
        ["launch, 2nd of a sweep (s)", "inline", *again],
        ["evaluation, MLP, 79 steps (s)", "1 rank", *evaluation],
        ["rows to the host, 79 steps (ms)", "without all_reduce", *rows],
        ["that all_reduce (ms)", share, reduced, whole, reduced / whole],
        ["agreements, 79 steps (ms)", share, agreed, whole, agreed / whole],
    ]
    table = pd.DataFrame(lines, columns=["what", "against", "ours", "theirs", "ratio"])
    print(table.to_string(index=False, float_format=lambda value: f"{value:,.3f}"))


if __name__ == "__main__":
    main()
