"""Measure how fast folders of pictures become batches, against torchvision's usual pipeline.

    python -m benchmarks.images
    python -m benchmarks.images --images 200 --rounds 2

Theirs is `ImageFolder` with `RandomResizedCrop(224)`, a flip, `ToTensor` and `Normalize` in a
`DataLoader`; ours is `data=image_folder` with the same augmentation and the same workers, without a
cache, and with each kind of it. They take turns in this process for several rounds of one epoch
each, whose batches are ready for the model. The script prints images per second, the CPU time per
image of the main process and its workers (on Linux), and the ratios of a round: median and
quartiles. Those of the CPU time are steadier on a machine that does other work, too. The pictures
are JPEGs of 500 x 375 pixels that it draws itself.
"""

from __future__ import annotations

import argparse
import logging
import math
import multiprocessing as mp
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from app.experiment.notebook import Experiment, compose
from app.runtime.memory import keep_freed_memory
from benchmarks.tables import Table, add_output_option, publish

QUICK = ("--images", "200", "--rounds", "1")
Epoch = Callable[[int], Iterable[object]]
THEIRS = "torchvision"
CACHES = {"no cache": "null", "cache=memory": "memory", "cache=disk": "disk"}
NUM_VALID = 4


def draw_pictures(folder: Path, number: int) -> None:
    """Write smooth random pictures with some noise, 70 kB each, for two classes."""
    rng = np.random.default_rng(0)
    for index in range(number):
        colors = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(colors.resize((500, 375), Image.Resampling.BICUBIC), np.float64)
        pixels = (smooth + rng.normal(0, 8, smooth.shape)).clip(0, 255)
        path = folder / f"class{index % 2}" / f"{index:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path, quality=90)


def their_epochs(root: Path, batch_size: int, workers: int) -> Epoch:
    """Return torchvision's pipeline."""
    steps = [
        transforms.RandomResizedCrop(224),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
    images = ImageFolder(str(root), transforms.Compose(steps))
    loader = DataLoader(
        images,
        batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return lambda _: (images.to(device, non_blocking=True) for images, _ in loader)


def our_experiment(root: Path, batch_size: int, workers: int, cache: str) -> Experiment:
    """Return our pipeline; the augmentation is the default one."""
    options = (
        *("data=image_folder", f"data.path={root}", f"data.batch_size={batch_size}"),
        *(f"data.loader.num_workers={workers}", f"data.cache={cache}", "model=mlp"),
        *(f"data.cache_folder={root.parent / 'cache'}", "model.hidden=[1]", "callbacks={}"),
    )
    return compose([*options], str(root.parent / f"run_{cache}"))


class Cost(NamedTuple):
    """Seconds of an epoch, and those of all CPUs together."""

    wall: float
    cpu: float


def cost(epoch: Epoch, number: int) -> Cost:
    """Measure an epoch."""
    start, cpu_start = time.perf_counter(), cpu_seconds()
    for _ in epoch(number):
        pass
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Cost(time.perf_counter() - start, cpu_seconds() - cpu_start)


def cpu_seconds() -> float:
    """Return the CPU time of this process and its workers; NaN except on Linux."""
    if sys.platform != "linux":
        return math.nan
    ticks = 0
    for pid in (os.getpid(), *(process.pid for process in mp.active_children())):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # user and system
    return ticks / os.sysconf("SC_CLK_TCK")


def compare(sides: dict[str, Epoch], rounds: int) -> dict[str, list[Cost]]:
    """Return the costs of each side by round; the first round, a warm-up, is left out."""
    costs: dict[str, list[Cost]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in [*sides] if number % 2 else [*reversed(sides)]:
            costs[name].append(cost(sides[name], number + 1))
    return {name: values[1:] for name, values in costs.items()}


def describe(costs: dict[str, list[Cost]], name: str, images: int) -> dict[str, float | str]:
    """Return the rates of a side and of torchvision, and their ratios."""
    ours, theirs = costs[name], costs[THEIRS]
    pairs = list(zip(theirs, ours, strict=True))
    rates = [images / statistics.median(c.wall for c in side) for side in (ours, theirs)]
    cpu = [1e3 * statistics.median(c.cpu for c in side) / images for side in (ours, theirs)]
    wall_ratio = median_and_quartiles([a.wall / b.wall for a, b in pairs])
    cpu_ratio = median_and_quartiles([a.cpu / max(b.cpu, 1e-3) for a, b in pairs])
    return {
        "ours": name,
        "images/s": rates[0],
        "torchvision's": rates[1],
        "ratio (quartiles)": wall_ratio,
        "CPU ms an image": cpu[0],
        "torchvision's ": cpu[1],
        "ratio (quartiles) ": cpu_ratio,
    }


def median_and_quartiles(values: list[float]) -> str:
    """Describe the ratios of several rounds."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    first, median, third = statistics.quantiles(values, method="inclusive")
    return f"{median:.2f} ({first:.2f} to {third:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, help="of torch here; by default one for each core")
    add_output_option(parser)
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    logging.disable()
    keep_freed_memory()  # as a run does
    sizes = f"{options.images} images, {options.workers} workers, {torch.get_num_threads()} threads"
    with tempfile.TemporaryDirectory() as temp, ExitStack() as stack:
        root = Path(temp, "pictures")
        draw_pictures(root / "train", options.images)
        draw_pictures(root / "valid", NUM_VALID)
        sides = {THEIRS: their_epochs(root / "train", options.batch_size, options.workers)}
        build_seconds = dict.fromkeys(CACHES, 0.0)
        for name, cache in CACHES.items():
            start = time.perf_counter()
            experiment = our_experiment(root, options.batch_size, options.workers, cache)
            stack.enter_context(experiment)
            sides[name] = experiment.loaders["train"].epoch
            build_seconds[name] = time.perf_counter() - start
        costs = compare(sides, options.rounds)
        rows = [
            {
                **describe(costs, name, options.images),
                "building the cache (s)": build_seconds[name] - build_seconds["no cache"],
            }
            for name in CACHES
        ]
        arrays = sum(path.stat().st_size for path in (root.parent / "cache").glob("*.safetensors"))
        pictures = sum(path.stat().st_size for path in root.rglob("*.jpg"))
        notes = [f"{sizes}; {pictures / 1e6:.0f} MB of JPEG, {arrays / 1e6:.0f} MB in the cache."]
        publish([Table("images", "Folders of pictures", rows, notes)], options.out)


if __name__ == "__main__":
    main()
