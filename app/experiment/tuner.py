"""Searches for a learning rate and for a batch size, before a training."""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf

from app.config.instantiate import Instantiator
from app.config.resume import replace_value
from app.config.schema import Job, TunerConfig
from app.config.secrets import reveal_config
from app.data.batch import Batch, BatchLoader
from app.distributed.collectives import world_size
from app.distributed.strategies import SingleDevice
from app.experiment.factory import make_components, make_optimizers
from app.runtime.device import is_out_of_memory, peak_memory
from app.runtime.errors import UserError
from app.runtime.figures import save_figure
from app.runtime.files import write_csv, write_text
from app.runtime.nested import map_tensors
from app.runtime.seed import rng_state, set_rng_state
from app.training.task import Task, check_step_output

log = logging.getLogger(__name__)
SMOOTHING = 0.05  # weight of the newest loss
DIVERGENCE_FACTOR = 4.0  # times the lowest smoothed loss so far


def find_learning_rate(task: Task, train: BatchLoader, find: TunerConfig, folder: Path) -> float:
    """Raises the learning rate step by step, evenly on a logarithmic scale (Smith 2017).

    Writes `find_lr.csv` and `find_lr.png`.

    Args:
        task: With its learning; its weights are changed.
        train: Batches, begun anew where there are too few.
        find: From where to where, in how many steps.
        folder: Files go there.

    Returns:
        The rate at which the smoothed loss falls steepest.

    Raises:
        UserError: The loss is not a number from the start, or never falls.
    """
    assert task.optimizers is not None
    task.model.train()
    rates = np.geomspace(find.lr_from, find.lr_to, find.steps)
    losses, smoothed, average = [], [], 0.0
    for step, (rate, batch) in enumerate(zip(rates, endless(train), strict=False), start=1):
        for optimization in task.optimizers.wrappers.values():
            for group in optimization.optimizer.param_groups:
                group["lr"] = rate
        task.on_step_start(1, step)
        with task.precision.autocast():
            value = check_step_output(task, "train", task.train_step(batch)).values["loss"]
        losses.append(float(value.value))  # type: ignore[union-attr]
        average += SMOOTHING * (losses[-1] - average)
        smoothed.append(average / (1 - (1 - SMOOTHING) ** step))
        if diverges(smoothed):
            log.info("the loss diverges at a learning rate of %.3g", rate)
            break
    table = pd.DataFrame({"lr": rates[: len(losses)], "loss": losses, "smoothed_loss": smoothed})
    write_csv(folder / "find_lr.csv", table)
    suggestion = steepest(table[np.isfinite(table["smoothed_loss"])])
    save_figure(folder / "find_lr.png", _curve(table, suggestion))
    return suggestion


def diverges(smoothed: list[float]) -> bool:
    """Whether the last loss lies far above the lowest, or is no number."""
    low = min(smoothed)
    margin = max(abs(low), 0.1 * abs(smoothed[0]))
    return not math.isfinite(smoothed[-1]) or smoothed[-1] > low + (DIVERGENCE_FACTOR - 1) * margin


def steepest(table: pd.DataFrame) -> float:
    """The learning rate at which the smoothed loss falls steepest.

    Raises:
        UserError: It never falls.
    """
    if len(table) < 3:
        raise UserError("find.lr_from: the loss diverges at once; try a smaller one")
    slope = np.gradient(table["smoothed_loss"].to_numpy(), np.log(table["lr"].to_numpy()))
    if slope.min() >= 0:
        raise UserError("find: the loss never falls between find.lr_from and find.lr_to")
    return float(table["lr"].iloc[int(slope.argmin())])


def find_batch_size(
    task: Task, train: BatchLoader, start: int, find: TunerConfig, folder: Path
) -> int:
    """Doubles the batch size until memory, the data or `find.batch_size_to` ends it.

    Writes `find_batch_size.csv`: samples per second and peak memory of each size.

    Args:
        task: With its learning; its weights are changed.
        train: A batch of it is repeated to make larger ones.
        start: The smallest size.
        find: The largest size, and how many batches each is measured on.
        folder: Files go there.

    Returns:
        The size of the most samples per second among those that fit into memory.
    """
    assert task.optimizers is not None
    task.model.train()
    rows = []
    for size in _doubled(start, min(find.batch_size_to, train.num_samples or find.batch_size_to)):
        try:
            seconds = _seconds(task, train.first(size), find.batches)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            log.info("a batch of %d samples does not fit into memory", size)
            break
        rows.append({"batch_size": size, "samples/s": size * find.batches / seconds})
        rows[-1] |= peak_memory(next(task.model.parameters()).device)
        log.info("batch size %d: %.0f samples/s", size, rows[-1]["samples/s"])
    if not rows:
        raise UserError(
            f"data.batch_size={start} does not fit into memory; start with a smaller one"
        )
    table = pd.DataFrame(rows)
    write_csv(folder / "find_batch_size.csv", table)
    return int(table["batch_size"].iloc[int(table["samples/s"].argmax())])


def _doubled(start: int, end: int) -> Iterator[int]:
    size = min(start, end)
    while size <= end:
        yield size
        size *= 2


def _seconds(task: Task, batch: Batch, batches: int) -> float:
    """Of so many steps, one more before the clock starts."""
    for step in range(batches + 1):
        if step == 1:
            _wait(batch)
            began = time.perf_counter()
        with task.precision.autocast():
            task.train_step(batch)
    _wait(batch)
    return time.perf_counter() - began


def _wait(batch: Batch) -> None:
    """Until the device is done."""
    map_tensors(lambda tensor: tensor.flatten()[:1].cpu(), batch)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def endless(train: BatchLoader) -> Iterator[Batch]:
    """Epoch after epoch."""
    for epoch in count(1):
        empty = True
        for batch in train.epoch(epoch):
            empty = False
            yield batch
        if empty:
            raise UserError("the train data gives no batch")


def _curve(table: pd.DataFrame, suggestion: float) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(table["lr"], table["loss"], alpha=0.3, label="loss")
    axes.plot(table["lr"], table["smoothed_loss"], label="smoothed")
    axes.axvline(suggestion, ls="--", color="k", lw=1, label=f"suggested: {suggestion:.2g}")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss")
    axes.legend()
    return figure


def find_batch_size_first(job: Job, device: torch.device, folder: Path) -> Job:
    """The job with the size of the most samples per second among those that fit into memory.

    The parts of the search are its own; `find_batch_size.csv` and `config.yaml` are written.

    Args:
        job: With the smallest size.
        device: That it is to run on.
        folder: Of the run.

    Raises:
        UserError: There are several ranks, or not even the smallest size fits.
    """
    if world_size() > 1:
        raise UserError(
            f"trainer.batch_size_finder=True is for one device, but there are {world_size()} ranks"
        )
    random = rng_state()
    size = _search(job, device, folder)
    set_rng_state(random)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    log.info("trainer.batch_size_finder: training runs with data.batch_size=%d", size)
    found = with_batch_size(job, size)
    write_text(folder / "config.yaml", yaml.safe_dump(found.plain, sort_keys=False))
    return found


def _search(job: Job, device: torch.device, folder: Path) -> int:
    config, build = job.config, Instantiator(job.trusted)
    parts = make_components(config, build, device)
    parallel = SingleDevice(parts.task.model)
    parts.task.optimizers = make_optimizers(config, build, parts, parallel, scheduled=False)
    parts.freezing.apply(1)
    start, train = config.data.batch_size, parts.loaders["train"]
    return find_batch_size(parts.task, train, start, config.find, folder)


def with_batch_size(job: Job, size: int) -> Job:
    """The same job with batches of that size, and whatever else is made of it."""
    template = OmegaConf.create(job.template)
    assert isinstance(template, DictConfig)
    plain, changed = replace_value(job.plain, template, "data.batch_size", size)
    return Job(
        reveal_config(plain), plain, OmegaConf.to_yaml(changed), job.trusted, job.differences
    )
