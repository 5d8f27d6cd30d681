"""Measure the overhead over plain PyTorch and the gain of the data loading.

    python -m benchmarks.overhead

Training is compared with a bare loop as tutorials write it (default optimizer), and with the best
bare loop (fused optimizer), on the same data in memory. Each side is a process of its own; they
take turns for several rounds, in an order that alternates. The script prints medians, the median
ratio of a round and its quartiles, because absolute times on a shared machine say little, and the
operator calls of a step. The last column has the targets.
"""

from __future__ import annotations

import argparse
import gzip
import io
import logging
import multiprocessing as mp
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from hydra._internal.utils import get_args_parser
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Subset
from torchvision import transforms

from app.callbacks.progress import Progress
from app.callbacks.tables import Tables
from app.config import resolvers
from app.config.compose import compositions
from app.config.instantiate import Instantiator
from app.config.schema import Job
from app.data.mnist import __file__ as MNIST
from app.experiment.factory import make_components
from app.experiment.job import make_job
from app.experiment.run import make_trainer
from app.runtime.memory import keep_freed_memory
from app.training.events import Callbacks
from benchmarks.tables import Table, add_output_option, publish

QUICK = ("--rounds", "1", "--models", "MLP")
CPU = torch.device("cpu")
MEAN, STD = 0.1307, 0.3081
PROFILED_STEPS = 20
OURS, BARE, BEST = "ours", "bare loop", "bare loop, fused optimizer"
PLAIN = ("scheduler=constant", "data.batch_size=256")
MODELS: dict[str, tuple[tuple[str, ...], float, float]] = {  # overrides; both targets
    "epoch, MLP 784-128-10": (("model=mlp",), 1.0, 1.08),
    "the same, warm-up and cosine": (("model=mlp", "scheduler=cosine"), 1.0, 1.08),
    "20 steps, AlexNet": (("model=alexnet", "trainer.limit_train_batches=20"), 0.98, 1.02),
    "20 steps, CNN": (("model=cnn", "trainer.limit_train_batches=20"), 0.98, 1.02),
    "10 steps, ResNet-18, 32 pixels, batch 64": (
        (
            *("model=resnet18", "data.resize=32", "data.batch_size=64"),
            "trainer.limit_train_batches=10",
        ),
        1.0,
        1.02,
    ),
}


class FakeTerminal(io.StringIO):
    """Stream that looks like a terminal and discards its input, so the progress bar is drawn."""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        return len(text)


Summary = dict[str, Any]  # medians, the median ratio and its quartiles


def alternate(rounds: int, sides: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Return the values of each side by round; the order alternates between rounds."""
    values: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):  # the first round is a warm-up
        for name in [*sides] if number % 2 else [*reversed(sides)]:
            values[name].append(sides[name]())
    return {name: numbers[1:] for name, numbers in values.items()}


def summarize(ours: list[float], theirs: list[float]) -> Summary:
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, middle, high = statistics.quantiles(ratios) if len(ratios) > 1 else ratios * 3
    return {
        "ours": statistics.median(ours),
        "theirs": statistics.median(theirs),
        "ratio": middle,
        "quartiles": f"{low:.3f}-{high:.3f}",
    }


def make_job_from(*overrides: str) -> Job:
    resolvers.register()
    ((composed, _),) = compositions(get_args_parser().parse_args(list(overrides)))
    return make_job(composed)


class Side:
    """A process that trains epochs when it is asked to.

    Args:
        make_epoch: Returns what trains an epoch; called in the process.
        arguments: Its arguments.
    """

    def __init__(self, make_epoch: Callable[..., Callable[[], int]], *arguments: object) -> None:
        self.connection, other = mp.get_context("spawn").Pipe()
        self.process = mp.get_context("spawn").Process(
            target=serve, args=(other, make_epoch, arguments), daemon=True
        )
        self.process.start()

    def seconds(self) -> float:
        """Train an epoch and return how long it took."""
        self.connection.send("time")
        return float(self.connection.recv())

    def operators(self) -> float:
        """Train an epoch and return the operator calls of a step."""
        self.connection.send("profile")
        return float(self.connection.recv())

    def close(self) -> None:
        self.connection.send(None)
        self.process.join()


def serve(
    connection: Connection, make_epoch: Callable[..., Callable[[], int]], arguments: tuple[Any, ...]
) -> None:
    """Answer requests until there is an empty one."""
    sys.stderr = FakeTerminal()
    logging.disable()
    epoch = make_epoch(*arguments)
    while request := connection.recv():
        if request == "time":
            start = time.perf_counter()
            epoch()
            connection.send(time.perf_counter() - start)
        else:
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                steps = epoch()
            connection.send(len(profiler.events()) / steps)


def our_epoch(folder: Path, overrides: tuple[str, ...]) -> Callable[[], int]:
    """Return the trainer's epoch, with tables, accuracy and bar."""
    keep_freed_memory()
    job = make_job_from(*overrides, "metric/single@metric.train=[accuracy]")
    parts = make_components(job.config, Instantiator(), CPU)
    callbacks = Callbacks([Tables(folder), Progress()])
    trainer = make_trainer(job, Instantiator(), parts, callbacks, folder)

    def epoch() -> int:
        number = len(trainer.state.history) + 1
        result = trainer.run_stage("train", number, parts.loaders["train"], is_training=True)
        return len(result.steps)

    return epoch


def bare_epoch(overrides: tuple[str, ...], is_fused: bool) -> Callable[[], int]:
    """Return an epoch of a bare loop."""
    job = make_job_from(*overrides)
    parts = make_components(job.config, Instantiator(), CPU)
    model, loader = parts.task.model, parts.loaders["train"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, fused=is_fused)
    images, labels = loader.tensors  # type: ignore[attr-defined]
    count, size = loader.num_samples, job.config.data.batch_size
    takes_images = next(p for p in model.parameters()).ndim == 4
    resize, pixels = job.config.data.resize, (images.shape[-1],) * 2

    def epoch() -> int:
        model.train()
        batches = torch.randperm(len(images))[:count].split(size)
        for batch in batches:
            x = images[batch].float().div_(255).sub_(MEAN).div_(STD)
            if resize and pixels != (resize, resize):
                x = F.interpolate(x, size=(resize, resize), mode="bilinear", antialias=True)
            if takes_images:
                x = x.contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(x), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return len(batches)

    return epoch


def training_rows(folder: Path, rounds: int, name: str) -> list[Summary]:
    """Compare the training of a model with both bare loops."""
    overrides, *targets = MODELS[name]
    overrides = (*PLAIN, *overrides)
    sides = {
        OURS: Side(our_epoch, folder, overrides),
        BARE: Side(bare_epoch, overrides, False),
        BEST: Side(bare_epoch, overrides, True),
    }
    times = alternate(rounds, {side: process.seconds for side, process in sides.items()})
    calls = {side: process.operators() for side, process in sides.items()}
    for process in sides.values():
        process.close()
    return [
        {
            "benchmark": f"{name} (s)",
            "baseline": other,
            **summarize(times[OURS], times[other]),
            "operators": f"{calls[OURS]:.0f} / {calls[other]:.0f}",
            "target": f"<= {target:.2f}",
        }
        for other, target in zip((BARE, BEST), targets, strict=True)
    ]


def torchvision_mnist(root: Path) -> Path:
    """Write the bundled MNIST files where torchvision looks for them; return the root folder."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in Path(str(MNIST)).parent.glob("*.gz"):
        (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    return root


def loader_rates(root: Path, rounds: int, workers: int) -> Summary:
    """Compare samples/s of our loader and of torchvision's MNIST in a `DataLoader`."""
    loader = make_components(
        make_job_from("model=mlp", "data.batch_size=256").config, Instantiator(), CPU
    ).loaders
    steps = transforms.Compose([transforms.ToTensor(), transforms.Normalize((MEAN,), (STD,))])
    dataset = Subset(torchvision.datasets.MNIST(str(root), transform=steps), range(10_000))
    theirs = DataLoader(dataset, batch_size=256, shuffle=True, num_workers=workers)

    def ours() -> float:
        start = time.perf_counter()
        count = sum(len(y) for _, y in loader["train"].epoch(1))
        return count / (time.perf_counter() - start)

    def bare() -> float:
        start = time.perf_counter()
        count = sum(len(y) for _, y in theirs)
        return count / (time.perf_counter() - start)

    values = alternate(rounds, {OURS: ours, BARE: bare})
    return summarize(values[OURS], values[BARE])


SCRIPT = """
import sys, torch, torchvision, torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, random_split
from torchvision import transforms
steps = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
mnist = torchvision.datasets.MNIST
train, test = (mnist(sys.argv[1], train=t, transform=steps) for t in (True, False))
train, valid = random_split(train, [55000, 5000])
model = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
def accuracy(dataset):
    model.eval()
    with torch.no_grad():
        right = sum((model(x).argmax(1) == y).sum() for x, y in DataLoader(dataset, batch_size=128))
    return right.item() / len(dataset)
for epoch in range(3):
    model.train()
    for x, y in DataLoader(train, batch_size=128, shuffle=True):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    print(epoch, accuracy(valid))
print("test", accuracy(test))
"""


def wall_times(root: Path, folder: Path, rounds: int) -> Summary:
    """Compare seconds of a complete 3-epoch run, including the start of Python."""
    app = [sys.executable, "-m", "app", "model=mlp", "trainer.max_epochs=3"]
    script = [sys.executable, "-c", SCRIPT, str(root)]

    def run(command: list[str]) -> float:
        start = time.perf_counter()
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        return time.perf_counter() - start

    values = alternate(rounds, {OURS: lambda: run(app), BARE: lambda: run(script)})
    return summarize(values[OURS], values[BARE])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--models", nargs="*", help="parts of the names of the models to measure")
    add_output_option(parser)
    options = parser.parse_args()
    rounds, few_rounds = options.rounds, max(1, options.rounds // 3)
    rows: list[Summary] = []
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        for number, name in enumerate(MODELS):
            if options.models is None or any(part in name for part in options.models):
                rows += training_rows(folder / str(number), rounds, name)
        if options.models is None:
            rows += data_rows(folder, few_rounds)
    publish([Table("overhead", "Overhead over a bare loop", rows)], options.out)


def data_rows(folder: Path, rounds: int) -> list[Summary]:
    """Compare the loading of data with torchvision's."""
    root = torchvision_mnist(folder / "torchvision")
    rows: list[Summary] = []
    for workers in (0, 2):
        names = {"benchmark": "loader, MNIST (samples/s)"}
        names["baseline"] = f"torchvision, {workers} workers"
        rows.append({**names, **loader_rates(root, rounds, workers), "target": ">= 15"})
    names = {"benchmark": "complete run, MLP, 3 epochs (s)", "baseline": "torchvision's loader"}
    return [*rows, {**names, **wall_times(root, folder, rounds)}]


if __name__ == "__main__":
    main()
