"""Measure training on a CUDA device: against bare loops, with each option that makes it faster.

    python -m benchmarks.gpu

Every side is built and trained in this process; sides take turns for several rounds, in an order
that alternates. Loading, augmentation and tables are part of ours, which trains with per-iteration
tables and accuracy; the bare loops have the same data on the device and record nothing.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from hydra._internal.utils import get_args_parser

from app.callbacks.tables import Tables
from app.config import resolvers
from app.config.compose import compositions
from app.config.instantiate import Instantiator
from app.config.schema import Job
from app.experiment.factory import make_components
from app.experiment.job import make_job
from app.experiment.run import make_trainer
from app.training.events import Callbacks
from app.training.precision import make_deterministic
from benchmarks.tables import Table, add_output_option, publish, skip

QUICK = ("--rounds", "2", "--steps", "10", "--tables", "mlp")
MEAN, STD = 0.1307, 0.3081
Epoch = Callable[[], int]  # trains and returns the number of samples
ACCURACY = "metric/single@metric.train=[accuracy]"
FP32 = ("trainer.precision=fp32", "scheduler=constant", "scheduler.warmup_steps=0")
MLP = ("model=mlp", "data.batch_size=256", *FP32)
ALEXNET = (
    *("model=alexnet", "model.width=1.0", "data.resize=224", "data.batch_size=256"),
    *("scheduler=constant", "scheduler.warmup_steps=0", "optimizer.lr=0.0001"),
)
SEEDS = range(3)


def job_from(*overrides: str) -> Job:
    resolvers.register()
    arguments = [*overrides, "trainer.accelerator=cuda", ACCURACY]
    ((composed, _),) = compositions(get_args_parser().parse_args(arguments))
    return make_job(composed)


def our_epoch(folder: Path, *overrides: str) -> Epoch:
    """Return an epoch of the trainer, with tables and accuracy."""
    job = job_from(*overrides)
    torch.set_float32_matmul_precision(job.config.trainer.matmul_precision)
    parts = make_components(job.config, Instantiator(), torch.device("cuda"))
    trainer = make_trainer(job, Instantiator(), parts, Callbacks([Tables(folder)]), folder)

    def epoch() -> int:
        number = len(trainer.state.history) + 1
        loader = parts.loaders["train"]
        trainer.run_stage("train", number, loader, is_training=True)
        assert loader.num_samples is not None
        return loader.num_samples

    return epoch


class BareLoop:
    """Loop as in a tutorial, on images that are on the device, with a fused optimizer.

    Args:
        autocast: Whether the forward pass runs in bf16.
        compiled: Whether the model is compiled.
        graphed: Whether the whole step is one CUDA graph.
        overrides: Overrides of the same model and data.
    """

    def __init__(self, autocast: bool, compiled: bool, graphed: bool, *overrides: str) -> None:
        job = job_from(*overrides)
        parts = make_components(job.config, Instantiator(), torch.device("cuda"))
        loader = parts.loaders["train"]
        self.model, self.count = parts.task.model, loader.num_samples or 0
        self.images, self.labels = loader.tensors  # type: ignore[attr-defined]
        self.size, self.resize = job.config.data.batch_size, job.config.data.resize
        self.is_image = next(self.model.parameters()).ndim == 4
        self.autocast = autocast
        self.forward: Callable[..., torch.Tensor] = self.model
        if compiled:
            self.forward = torch.compile(self.model)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), 1e-4, weight_decay=0.01, fused=True, capturable=graphed
        )
        self.graph: torch.cuda.CUDAGraph | None = None
        self.index = torch.zeros(self.size, dtype=torch.int64, device="cuda")
        if graphed:
            self.record()

    def record(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step(self.index)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step(self.index)

    def step(self, index: torch.Tensor) -> None:
        x = self.images[index].float().div_(255).sub_(MEAN).div_(STD)
        if self.resize:
            x = F.interpolate(x, size=(self.resize,) * 2, mode="bilinear", antialias=True)
        if self.is_image:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cuda", torch.bfloat16, enabled=self.autocast):
            loss = F.cross_entropy(self.forward(x), self.labels[index])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def epoch(self) -> int:
        self.model.train()
        order = torch.randperm(len(self.images), device="cuda")[: self.count]
        for index in order.split(self.size):
            if self.graph is not None and len(index) == self.size:
                self.index.copy_(index)
                self.graph.replay()
            else:
                self.step(index)
        return self.count


def rates(sides: dict[str, Epoch], rounds: int) -> dict[str, list[float]]:
    """Return the samples/s of each side by round; the order alternates between rounds."""
    values: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):  # the first round is a warm-up
        for name in [*sides] if number % 2 else [*reversed(sides)]:
            torch.cuda.synchronize()
            start = time.perf_counter()
            count = sides[name]()
            torch.cuda.synchronize()
            values[name].append(count / (time.perf_counter() - start))
    return {name: numbers[1:] for name, numbers in values.items()}


def rows(values: dict[str, list[float]], baseline: str, batch: int) -> list[dict[str, Any]]:
    result = []
    for name, numbers in values.items():
        ratios = [a / b for a, b in zip(numbers, values[baseline], strict=True)]
        low, middle, high = statistics.quantiles(ratios)
        median = statistics.median(numbers)
        result.append(
            {
                "side": name,
                "samples/s": median,
                "ms per step": 1000 * batch / median,
                f"rate / {baseline}": middle,
                "quartiles": f"{low:.3f} to {high:.3f}",
            }
        )
    return result


def mlp_table(folder: Path, rounds: int) -> Table:
    sides = {
        "ours": our_epoch(folder / "mlp", *MLP),
        "ours, cuda_graph": our_epoch(folder / "mlp_graph", *MLP, "trainer.cuda_graph=true"),
        "bare loop": BareLoop(False, False, False, *MLP).epoch,
        "bare CUDA graph": BareLoop(False, False, True, *MLP).epoch,
    }
    values = rates(sides, rounds)
    return Table("gpu_mlp", "MLP 784-128-10, batch 256", rows(values, "bare CUDA graph", 256))


def alexnet_table(folder: Path, rounds: int, steps: int) -> Table:
    options = (*ALEXNET, f"trainer.limit_train_batches={steps}")
    bf16, graph = "trainer.precision=bf16", "trainer.cuda_graph=true"
    sides = {
        "ours, bf16": our_epoch(folder / "a", *options, bf16),
        "ours, bf16, compiled": our_epoch(folder / "b", *options, bf16, "trainer.compile=true"),
        "ours, bf16, cuda_graph": our_epoch(folder / "c", *options, bf16, graph),
        "bare loop, bf16": BareLoop(True, False, False, *options).epoch,
        "bare loop, bf16, compiled": BareLoop(True, True, False, *options).epoch,
    }
    values = rates(sides, rounds)
    title = "AlexNet of full width at 224 pixels, batch 256, MNIST"
    note = "TorchExpManager states 1,880 samples/s for Fashion-MNIST, which has the same shape."
    return Table("gpu_alexnet", title, rows(values, "bare loop, bf16, compiled", 256), [note])


def precision_table(folder: Path, rounds: int, steps: int) -> Table:
    options = (*ALEXNET, f"trainer.limit_train_batches={steps}")
    values: dict[str, list[float]] = {}
    for name, option in (
        ("fp32", ("trainer.precision=fp32",)),
        ("fp32, TF32", ("trainer.precision=fp32", "trainer.matmul_precision=high")),
        ("bf16", ("trainer.precision=bf16",)),
        ("bf16-true", ("trainer.precision=bf16-true",)),
        ("bf16, not channels_last", ("trainer.precision=bf16", "trainer.channels_last=false")),
    ):
        side = {name: our_epoch(folder / name.replace(" ", ""), *options, *option)}
        values |= rates(side, rounds)
    title = "AlexNet of full width at 224 pixels, batch 256: precision and layout"
    return Table("gpu_precision", title, rows(values, "fp32", 256), ["One after another."])


def speedrun_table(folder: Path) -> Table:
    result = []
    for seed in SEEDS:
        run = folder / f"speedrun{seed}"
        command = [sys.executable, "-m", "app", "experiment=mnist_speedrun", f"seed={seed}"]
        start = time.perf_counter()
        subprocess.run(
            [*command, f"hydra.run.dir={run}"], check=True, stdout=subprocess.DEVNULL, cwd=folder
        )
        seconds = time.perf_counter() - start
        table = pd.read_csv(run / "summary_table.csv")
        train = table[table["stage"] == "train"]
        test = pd.read_csv(run / "test_summary_table.csv")
        result.append(
            {
                "seed": seed,
                "test accuracy": float(test["accuracy"].iloc[-1]),
                "training (s)": float(train["epoch_time"].sum()),
                "of its last epoch (s)": float(train["epoch_time"].iloc[-1]),
                "whole command (s)": seconds,
            }
        )
    note = (
        "Training is the sum of epoch_time; libraries are loaded and the step is recorded before."
    )
    return Table("gpu_speedrun", "MNIST: experiment=mnist_speedrun", result, [note])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60, help="steps of an epoch of AlexNet")
    parser.add_argument("--tables", nargs="*", choices=("mlp", "alexnet", "speedrun", "precision"))
    add_output_option(parser)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        skip("this benchmark needs a CUDA device")
    logging.disable()
    make_deterministic(deterministic=False)
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        rounds, steps = options.rounds, options.steps
        makers: dict[str, Callable[[], Table]] = {
            "mlp": lambda: mlp_table(folder, rounds),
            "alexnet": lambda: alexnet_table(folder, rounds, steps),
            "speedrun": lambda: speedrun_table(folder),
            "precision": lambda: precision_table(folder, rounds, steps),
        }
        for name in options.tables or makers:
            publish([makers[name]()], options.out)
            torch.cuda.empty_cache()
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}; NCCL is not measured on one device.")


if __name__ == "__main__":
    main()
