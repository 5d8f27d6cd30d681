"""Measure the speed-up and the overhead of training on several ranks.

    python -m benchmarks.scaling

Every run uses the CPU with one thread per rank; runs on two ranks and on one rank alternate. The
script prints the median over the rounds and the median of the per-round ratios, because absolute
times on a shared machine say little. Three rounds took four and a half minutes on two cores that
were lightly used by other processes.

- training: median images/s over the steps of AlexNet's second epoch, 2 ranks against 1. The global
  batch size is 256 in both cases, so the best possible ratio is 2.
- launch: seconds from starting a sweep of two jobs to the first training step of the last rank of
  the first job, 2 ranks against `launch=inline`.
- launch, 2nd job of a sweep: seconds from the last file of the first job to the first step of the
  second one. By then Python is running, and ranks are forked from a process that has torch.
- evaluation: seconds for the MLP on all 10,000 test images, 2 ranks against 1. The steps are so
  short that this is dominated by communication.
- reduce step sums: milliseconds to bring the sums of all those steps to the host at the end of the
  stage, on 2 ranks at the same time, with the `all_reduce` against without it.
- of which all_reduce: what the `all_reduce` adds, also as a share of the evaluation on 2 ranks.
- stop consensus: milliseconds for the messages, one per step, with which ranks agree to stop, also
  as a share of the evaluation. Here they are sent back to back, whereas in a run they overlap with
  the step, so this is an upper bound.
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
from app.training.step_values import StepBlock, StepValues, average
from benchmarks.tables import Table, add_output_option, publish

QUICK = ("--rounds", "1")
Pair = tuple[float, float]  # with several ranks, without
STEPS = 79  # batches of 128 in the 10,000 test images
REPEATS = 20  # per round, for measurements of milliseconds
BASIC_SWEEPER = "hydra/sweeper=basic"  # uses the folder names of hydra.sweep
PLAIN = ("trainer.accelerator=cpu", "trainer.precision=fp32", "~callbacks.plots")
SHORT = ("trainer.max_epochs=1", "trainer.limit_train_batches=2", "trainer.limit_valid_batches=2")
TASK = """
import time

from app.distributed.collectives import rank
from app.training.supervised import SupervisedTask


class TimedTask(SupervisedTask):
    has_started = False

    def train_step(self, batch):
        if not self.has_started:
            self.has_started = True
            with open("first_steps.csv", "a") as file:
                print(rank(), time.time(), sep=",", file=file)
        return super().train_step(batch)
"""


def run_app(folder: Path, *overrides: str) -> None:
    """Run the program; only its stderr is shown."""
    subprocess.run(
        [sys.executable, "-m", "app", *overrides],
        cwd=folder,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )


def medians(pairs: Iterable[Pair]) -> list[float]:
    """Return both medians and the median of the ratios."""
    triples = [(ours, theirs, ours / theirs) for ours, theirs in pairs]
    return [statistics.median(values) for values in zip(*triples, strict=True)]


def compare_devices(
    folder: Path, rounds: int, read: Callable[[Path], float], *overrides: str
) -> list[float]:
    """Run on 2 ranks and on 1, as two jobs of one sweep, and compare what `read` finds."""
    pairs = []
    for number in range(rounds):
        runs, order = Path(tempfile.mkdtemp(dir=folder)), "2,1" if number % 2 else "1,2"
        folders = (f"hydra.sweep.dir={runs}", "hydra.sweep.subdir=${trainer.devices}")
        run_app(
            folder,
            "-m",
            BASIC_SWEEPER,
            *overrides,
            *folders,
            "launch=local",
            f"trainer.devices={order}",
        )
        pairs.append((read(runs / "2"), read(runs / "1")))
    return medians(pairs)


def training_rates(folder: Path, rounds: int) -> list[float]:
    """Return images/s of AlexNet."""
    overrides = (
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

    return compare_devices(folder, rounds, rate, *overrides, *PLAIN)


def evaluation_times(folder: Path, rounds: int) -> list[float]:
    """Return seconds for the MLP on all test images."""
    run_app(folder, "model=mlp", *SHORT, *PLAIN, "hydra.run.dir=trained")

    def seconds(folder: Path) -> float:
        summary = pd.read_csv(folder / "test_summary_table.csv")
        assert summary["total_samples"].item() == 10_000
        return float(summary["epoch_time"].item())

    return compare_devices(folder, rounds, seconds, "mode=test", "ckpt=trained")


def launch_times(folder: Path, rounds: int) -> tuple[list[float], list[float]]:
    """Return seconds until the first training step of a sweep's first and second job."""
    (folder / "first_step.py").write_text(TASK)
    starts, pairs = ["trainer.devices=2", "launch=inline"], []
    for number in range(rounds):
        order = starts[::-1] if number % 2 else starts
        times = {start: first_step_times(folder, start) for start in order}
        pairs.append(zip(times[starts[0]], times[starts[1]], strict=True))
    first, second = zip(*pairs, strict=True)
    return medians(first), medians(second)


def first_step_times(folder: Path, start: str) -> tuple[float, float]:
    """Return seconds from the command to step 1, and from the end of job 1 to step 1 of job 2."""
    runs = Path(tempfile.mkdtemp(dir=folder))
    folders = (f"hydra.sweep.dir={runs}", "hydra.sweep.subdir=${seed}")
    task = ("task._target_=first_step.TimedTask", "trusted_targets=[first_step]")
    started = time.time()
    overrides = ("seed=0,1", "model=mlp", start, *SHORT, *PLAIN, *task, *folders)
    run_app(folder, "-m", BASIC_SWEEPER, *overrides)
    first, second = read_first_steps(folder / "first_steps.csv")
    return first - started, second - (runs / "0" / "status.json").stat().st_mtime


def read_first_steps(file: Path) -> list[float]:
    """Return when the last rank of each job reached its first step, and delete the file."""
    by_rank = pd.read_csv(file, names=["rank", "time"]).groupby("rank")["time"]
    file.unlink()
    return [max(times) for times in zip(*(list(times) for _, times in by_rank), strict=True)]


def communication_times(folder: Path, rounds: int) -> tuple[list[float], list[float]]:
    """Return milliseconds to bring step sums to the host and to agree after every step."""
    with mp.get_context("forkserver").Pool(2) as pool:
        function = partial(measure_communication, str(folder / "store"), rounds)
        first, _ = pool.map(function, range(2), chunksize=1)
    reductions, agreements = zip(*first, strict=True)
    return medians(reductions), medians(agreements)


def measure_communication(path: str, rounds: int, rank: int) -> list[tuple[Pair, Pair]]:
    """Measure on one of two ranks, in each round with the other rank and alone."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    torch.set_num_threads(1)
    store, cluster = FileStore(path, 2), ClusterEnvironment("local", rank, 2, rank, 2, "", 0)
    reduce_steps, pairs = partial(reduce_to_host, make_stage_steps()), []
    for number in range(rounds):
        alone = milliseconds(reduce_steps), milliseconds(agree_on_every_step)
        with process_group(cluster, store, number, timeout=60):
            together = milliseconds(reduce_steps), milliseconds(agree_on_every_step)
        pairs.append(((together[0], alone[0]), (together[1], alone[1])))
    return pairs


def make_stage_steps() -> list[StepValues]:
    """Return for each step a loss, the four states of an accuracy, and the number correct."""
    correct = torch.tensor(60)
    return [
        {
            "loss": average(torch.rand(()), 64),
            "accuracy": (correct,) * 4,
            "total_correct": (correct,),
        }
        for _ in range(STEPS)
    ]


def reduce_to_host(rows: list[StepValues]) -> None:
    """Sum the values of several steps over ranks."""
    StepBlock(rows).get()


def agree_on_every_step() -> None:
    """Agree after every step of a stage that nobody wants to stop."""
    lazy_max = LazyAllReduceMax()
    for _ in range(STEPS):
        lazy_max(0)
    lazy_max.wait(0)


def milliseconds(action: Callable[[], object]) -> float:
    """Return the median time of an action; ranks start each repetition together."""
    times = []
    for _ in range(REPEATS):
        if is_distributed():
            dist.barrier()
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    add_output_option(parser)
    options = parser.parse_args()
    rounds = options.rounds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        training = training_rates(folder, rounds)
        first_launch, second_launch = launch_times(folder, rounds)
        evaluation = evaluation_times(folder, rounds)
        reductions, agreements = communication_times(folder, rounds)
    all_reduce, consensus = reductions[0] - reductions[1], agreements[0]
    total = 1000 * evaluation[0]
    share = "evaluation, 2 ranks (ms)"
    rows = [
        ["training, AlexNet, batch 256 (images/s)", "1 rank", *training],
        ["launch (s)", "inline", *first_launch],
        ["launch, 2nd job of a sweep (s)", "inline", *second_launch],
        ["evaluation, MLP, 79 steps (s)", "1 rank", *evaluation],
        ["reduce step sums, 79 steps (ms)", "without all_reduce", *reductions],
        ["of which all_reduce (ms)", share, all_reduce, total, all_reduce / total],
        ["stop consensus, 79 steps (ms)", share, consensus, total, consensus / total],
    ]
    columns = ["benchmark", "baseline", "ours", "theirs", "ratio"]
    values = [dict(zip(columns, row, strict=True)) for row in rows]
    notes = [f"Medians of {rounds} rounds; the ratio is the median of those of the rounds."]
    publish([Table("scaling", "Several ranks", values, notes)], options.out)


if __name__ == "__main__":
    main()
