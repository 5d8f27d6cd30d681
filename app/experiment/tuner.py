"""Search for a learning rate (`mode=find_lr`) or a batch size before training.

The batch size search runs on its own (`mode=find_batch_size`) or as the first part of a training
(`trainer.batch_size_finder`).
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from app.config.instantiate import Instantiator
from app.config.resume import replace_value
from app.config.schema import Config, Job, TunerConfig
from app.data.batch import Batch, BatchLoader
from app.distributed.collectives import world_size
from app.distributed.strategies import SingleDevice
from app.experiment.factory import Components, make_components
from app.experiment.job import save_config
from app.experiment.optimizers import make_optimizers
from app.runtime.device import is_out_of_memory, peak_memory
from app.runtime.errors import UserError
from app.runtime.figures import save_figure
from app.runtime.files import write_csv
from app.runtime.nested import map_tensors
from app.runtime.seed import rng_state, set_rng_state
from app.training.task import Task, check_step_output

log = logging.getLogger(__name__)
LOSS_SMOOTHING = 0.05  # weight of the newest loss in the moving average
DIVERGENCE_FACTOR = 4.0  # the search ends at this multiple of the lowest smoothed loss


# ---- learning rate


def find_learning_rate(task: Task, train: BatchLoader, find: TunerConfig, folder: Path) -> float:
    """Raise the learning rate after each step, evenly on a logarithmic scale (Smith 2017).

    Writes `find_lr.csv` and `find_lr.png`.

    Args:
        task: Has optimizers; its weights are changed.
        train: The training batches, repeated if there are fewer than steps.
        find: The range of learning rates and the number of steps.
        folder: Where to write the files.

    Returns:
        The learning rate at which the smoothed loss falls fastest.

    Raises:
        UserError: The loss diverges in the first steps, or never falls.
    """
    assert task.optimizers is not None
    task.model.train()
    rates = np.geomspace(find.lr_from, find.lr_to, find.steps)
    losses, smoothed, average = [], [], 0.0
    for step, (rate, batch) in enumerate(zip(rates, cycle_batches(train), strict=False), start=1):
        for wrapper in task.optimizers.wrappers.values():
            for group in wrapper.optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
        task.on_step_start(1, step)
        with task.precision.autocast():
            loss = check_step_output(task, "train", task.train_step(batch)).values["loss"]
        losses.append(float(loss.value))  # type: ignore[union-attr]
        average += LOSS_SMOOTHING * (losses[-1] - average)
        smoothed.append(average / (1 - (1 - LOSS_SMOOTHING) ** step))
        if has_diverged(smoothed):
            log.info("the loss diverges at a learning rate of %.3g", rate)
            break
    table = pd.DataFrame({"lr": rates[: len(losses)], "loss": losses, "smoothed_loss": smoothed})
    write_csv(folder / "find_lr.csv", table)
    suggestion = steepest_lr(table[np.isfinite(table["smoothed_loss"])])
    save_figure(folder / "find_lr.png", _plot_losses(table, suggestion))
    return suggestion


def cycle_batches(train: BatchLoader) -> Iterator[Batch]:
    """Yield the batches of one epoch after another, without end.

    Raises:
        UserError: The loader has no batches.
    """
    for epoch in count(1):
        empty = True
        for batch in train.epoch(epoch):
            empty = False
            yield batch
        if empty:
            raise UserError("the training data has no batches")


def has_diverged(smoothed: list[float]) -> bool:
    """Whether the last loss is far above the lowest one, or not finite."""
    low = min(smoothed)
    margin = max(abs(low), 0.1 * abs(smoothed[0]))
    return not math.isfinite(smoothed[-1]) or smoothed[-1] > low + (DIVERGENCE_FACTOR - 1) * margin


def steepest_lr(table: pd.DataFrame) -> float:
    """Return the learning rate at which the smoothed loss falls fastest.

    Raises:
        UserError: There are too few losses, or they never fall.
    """
    if len(table) < 3:
        raise UserError("find.lr_from: the loss diverges immediately; try a smaller value")
    slope = np.gradient(table["smoothed_loss"].to_numpy(), np.log(table["lr"].to_numpy()))
    if slope.min() >= 0:
        raise UserError("find: the loss never falls between find.lr_from and find.lr_to")
    return float(table["lr"].iloc[int(slope.argmin())])


def _plot_losses(table: pd.DataFrame, suggestion: float) -> Figure:
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


# ---- batch size


def find_batch_size(
    task: Task, train: BatchLoader, start: int, find: TunerConfig, folder: Path
) -> int:
    """Double the batch size until it exceeds memory, the dataset or `find.batch_size_to`.

    Writes `find_batch_size.csv` with the samples per second and peak memory of each size.

    Args:
        task: Has optimizers; its weights are changed.
        train: Its first samples make up the batches.
        start: The smallest batch size.
        find: The largest batch size, and the number of batches to time for each size.
        folder: Where to write the file.

    Returns:
        The batch size with the most samples per second among those that fit into memory.

    Raises:
        UserError: Not even the smallest batch size fits into memory.
    """
    assert task.optimizers is not None
    task.model.train()
    rows = []
    end = min(find.batch_size_to, train.num_samples or find.batch_size_to)
    for size in _doubling_sizes(start, end):
        try:
            seconds = _time_steps(task, train.first(size), find.batches)
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


def _doubling_sizes(start: int, end: int) -> Iterator[int]:
    size = min(start, end)
    while size <= end:
        yield size
        size *= 2


def _time_steps(task: Task, batch: Batch, num_steps: int) -> float:
    """Return the seconds of `num_steps` training steps, after one warmup step."""
    for step in range(num_steps + 1):
        if step == 1:
            _synchronize(batch)
            start = time.perf_counter()
        with task.precision.autocast():
            task.train_step(batch)
    _synchronize(batch)
    return time.perf_counter() - start


def _synchronize(batch: Batch) -> None:
    map_tensors(lambda tensor: tensor.flatten()[:1].cpu(), batch)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def apply_batch_size_finder(job: Job, device: torch.device, folder: Path) -> Job:
    """Search for a batch size before training, and return the job with that size.

    The search builds its own components and does not advance the random generators. Writes
    `find_batch_size.csv`, and replaces `config.yaml`.

    Args:
        job: Its batch size is the smallest one to try.
        device: The device of the run.
        folder: The run folder.

    Raises:
        UserError: There are several ranks, or not even the smallest size fits into memory.
    """
    if world_size() > 1:
        raise UserError(
            "trainer.batch_size_finder=True needs a single device, "
            f"but there are {world_size()} ranks"
        )
    saved_rng_state = rng_state()
    size = _search_batch_size(job, device, folder)
    set_rng_state(saved_rng_state)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    log.info("trainer.batch_size_finder: training runs with data.batch_size=%d", size)
    tuned = replace_batch_size(job, size)
    without_search = replace_value(tuned, "trainer.batch_size_finder", False)
    save_config(replace(tuned, saved=without_search.saved), folder)  # a restart does not search
    return tuned


def _search_batch_size(job: Job, device: torch.device, folder: Path) -> int:
    config, instantiator = job.config, Instantiator(job.trusted)
    components = make_components(config, instantiator, device)
    prepare_tuning(config, instantiator, components)
    start, train = config.data.batch_size, components.loaders["train"]
    return find_batch_size(components.task, train, start, config.find, folder)


def prepare_tuning(config: Config, instantiator: Instantiator, components: Components) -> None:
    """Build the optimizers of the task for training steps on one device, without a schedule."""
    strategy = SingleDevice(components.task.model)
    optimizers = make_optimizers(config, instantiator, components, strategy, use_scheduler=False)
    components.task.prepare_training(optimizers)
    components.freezing.apply(1)


def replace_batch_size(job: Job, size: int) -> Job:
    """Return the job with another batch size, and with all values interpolated from it."""
    return replace_value(job, "data.batch_size", size)
