"""Measure the overhead over plain PyTorch and the gain of the data loading.

    python benchmarks/overhead.py

Both sides of each comparison alternate in this process for several rounds. The script prints
medians and the median ratio, because absolute times on a shared machine say little. The last
column has the targets.
"""

from __future__ import annotations

import argparse
import gzip
import io
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
import torchvision
from hydra._internal.utils import get_args_parser
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
from app.training.events import Callbacks

CPU = torch.device("cpu")
MEAN, STD = 0.1307, 0.3081


class FakeTerminal(io.StringIO):
    """Stream that looks like a terminal and discards its input, so the progress bar is drawn."""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        return len(text)


def alternate(rounds: int, ours: Callable[[], float], theirs: Callable[[], float]) -> list[float]:
    """Return both medians and the median ratio; the order alternates between rounds."""
    pairs = []
    for number in range(rounds + 1):  # the first round is a warm-up
        first, second = (ours, theirs) if number % 2 else (theirs, ours)
        a, b = first(), second()
        pairs.append((a, b) if number % 2 else (b, a))
    pairs = pairs[1:]
    ratio = statistics.median(a / b for a, b in pairs)
    return [statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs), ratio]


def make_job_from(*overrides: str) -> Job:
    resolvers.register()
    ((composed, _),) = compositions(get_args_parser().parse_args(list(overrides)))
    return make_job(composed)


def epoch_times(folder: Path, rounds: int, *overrides: str) -> list[float]:
    """Return seconds per epoch: trainer with tables, accuracy and bar against a bare loop."""
    job = make_job_from(*overrides, "metric/single@metric.train=[accuracy]")
    parts = make_components(job.config, Instantiator(), CPU)
    callbacks = Callbacks([Tables(folder), Progress()])
    trainer = make_trainer(job, Instantiator(), parts, callbacks, folder)

    model = make_components(job.config, Instantiator(), CPU).task.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    images, labels = parts.loaders["train"].tensors  # type: ignore[attr-defined]
    count, size = parts.loaders["train"].num_samples, job.config.data.batch_size
    takes_images = next(p for p in model.parameters()).ndim == 4

    def ours() -> float:
        start = time.perf_counter()
        trainer.run_stage(
            "train", len(trainer.state.history) + 1, parts.loaders["train"], is_training=True
        )
        return time.perf_counter() - start

    def bare() -> float:
        start = time.perf_counter()
        model.train()
        for batch in torch.randperm(len(images))[:count].split(size):
            x = images[batch].float().div_(255).sub_(MEAN).div_(STD)
            if takes_images:
                x = x.contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(x), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return time.perf_counter() - start

    return alternate(rounds, ours, bare)


def torchvision_mnist(root: Path) -> Path:
    """Write the bundled MNIST files where torchvision looks for them; return the root folder."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in Path(str(MNIST)).parent.glob("*.gz"):
        (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    return root


def loader_rates(root: Path, rounds: int, workers: int) -> list[float]:
    """Return samples/s of our loader and of torchvision's MNIST in a `DataLoader`."""
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

    return alternate(rounds, ours, bare)


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


def wall_times(root: Path, folder: Path, rounds: int) -> list[float]:
    """Return seconds of a complete 3-epoch run, including the start of Python."""
    app = [sys.executable, "-m", "app", "model=mlp", "trainer.max_epochs=3"]
    script = [sys.executable, "-c", SCRIPT, str(root)]

    def run(command: list[str]) -> float:
        start = time.perf_counter()
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        return time.perf_counter() - start

    return alternate(rounds, lambda: run(app), lambda: run(script))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    few_rounds = max(1, rounds // 3)
    real_stderr, sys.stderr = sys.stderr, FakeTerminal()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        root = torchvision_mnist(folder / "torchvision")
        plain = ("scheduler=constant", "data.batch_size=256")
        mlp = epoch_times(folder / "mlp", rounds, "model=mlp", *plain)
        rows.append(["epoch, MLP 784-128-10, batch 256 (s)", "bare loop", *mlp, "<= 1.15"])
        warmup = ("model=mlp", "scheduler=cosine", "data.batch_size=256")
        cosine = epoch_times(folder / "cosine", rounds, *warmup)
        rows.append(
            ["same, with warm-up and cosine schedule (s)", "bare loop, fixed lr", *cosine, ""]
        )
        large = ("model=alexnet", *plain, "trainer.limit_train_batches=40")
        alexnet = epoch_times(folder / "alexnet", rounds, *large)
        rows.append(["40 steps, AlexNet, batch 256 (s)", "bare loop", *alexnet, "<= 1.03"])
        for workers in (0, 2):
            rates = loader_rates(root, few_rounds, workers)
            other = f"torchvision, {workers} workers"
            rows.append(["loader, MNIST (samples/s)", other, *rates, ">= 15"])
        wall = wall_times(root, folder, few_rounds)
        rows.append(["complete run, MLP, 3 epochs (s)", "torchvision loader", *wall, ""])
    sys.stderr = real_stderr
    columns = ["benchmark", "baseline", "ours", "theirs", "ratio", "target"]
    table = pd.DataFrame(rows, columns=columns)
    print(table.to_string(index=False, float_format=lambda value: f"{value:,.3f}"))


if __name__ == "__main__":
    main()
