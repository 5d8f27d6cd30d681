"""The parts that a configuration names, put together; below here nobody knows of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchmetrics import Metric

from app.config.instantiate import Build
from app.config.schema import Config, Job
from app.data.batch import Batches
from app.data.datamodule import STAGES, make_datasets, make_loaders
from app.distributed.collectives import alone, first_before_others
from app.distributed.sync_batchnorm import synchronize_norms
from app.losses.weighted_sum import Term, WeightedSum
from app.metrics.output_metric import Selected
from app.metrics.stage_metrics import StageMetrics, as_metrics
from app.runtime.errors import UserError
from app.runtime.seed import seed_everything
from app.training.events import Callback
from app.training.optim.freezing import Freezing
from app.training.precision import Precision, memory_format
from app.training.task import Task
from app.trial import try_on


@dataclass(frozen=True)
class Parts:
    """What every mode needs.

    Attributes:
        task: The steps, its model on the device.
        loaders: The batches of each stage that has data and is wanted.
        freezing: Of the model's parameters.
        device: That all runs on.
    """

    task: Task
    loaders: dict[str, Batches]
    freezing: Freezing
    device: torch.device


def make_parts(config: Config, build: Build, device: torch.device) -> Parts:
    """The model, the data and the steps, tried on two samples.

    Raises:
        UserError: A part cannot be built, or they do not fit together.
    """
    model = make_model(config, build, device)
    format_ = _format(config, model)
    with first_before_others():
        datasets = make_datasets(config, build)
    loaders = make_loaders(config, build, datasets, device, format_)
    task = make_task(config, build, model, device)
    for stage, loader in loaders.items():
        try_on(task, stage, loader, config.data)
    frozen = {name: freeze for name, freeze in config.freeze.items() if freeze is not None}
    freezing = Freezing(model, frozen)
    if config.trainer.compile:
        model.compile()
    return Parts(task, loaders, freezing, device)


def make_model(config: Config, build: Build, device: torch.device) -> nn.Module:
    """The model on the device; its first weights depend on the seed alone.

    Raises:
        UserError: What is built is no module.
    """
    seed_everything(config.seed, "model")
    model = build("model", config.model)
    if not isinstance(model, nn.Module):
        raise UserError(f"model: {config.model['_target_']} is no torch.nn.Module")
    if config.mode == "train" and config.trainer.sync_batchnorm and not alone():
        model = synchronize_norms(model, device)
    format_ = _format(config, model)
    return model.to(device=device, memory_format=format_)  # type: ignore[call-overload,no-any-return]


def _format(config: Config, model: nn.Module) -> torch.memory_format:
    """Parts of weights must be contiguous."""
    if config.trainer.strategy == "fsdp":
        return torch.contiguous_format
    return memory_format(config.trainer.channels_last, model)


def make_task(config: Config, build: Build, model: nn.Module, device: torch.device) -> Task:
    """The steps on the device, for now without learning.

    Raises:
        UserError: A part is not of its kind.
    """
    named = ((stage, getattr(config.metric, stage)) for stage in STAGES)
    task = build(
        "task",
        config.task,
        model=model,
        loss=make_loss(config, build),
        metrics={stage: make_metrics(stage, nodes, build) for stage, nodes in named},
        precision=Precision.choose(config.trainer.precision, device),
    )
    if not isinstance(task, Task):
        raise UserError(f"task._target_={config.task['_target_']!r} is no app.training.task.Task")
    task.to(device)
    return task


def make_loss(config: Config, build: Build) -> WeightedSum:
    """The terms of the loss.

    Raises:
        UserError: One is no term.
    """
    terms = build.named("loss", config.loss)
    for name, term in terms.items():
        if not isinstance(term, Term):
            raise UserError(f"loss.{name}._target_ must be app.losses.weighted_sum.Term")
        if not callable(term.function):
            raise UserError(f"loss.{name}.function={term.function!r} is no function or module")
    return WeightedSum(terms)


def make_metrics(stage: str, nodes: Mapping[str, Any], build: Build) -> StageMetrics:
    """The metrics of a stage.

    Raises:
        UserError: One is neither of torchmetrics nor a function.
    """
    named = build.named(f"metric.{stage}", dict(nodes))
    for name, metric in named.items():
        measured = metric.metric if isinstance(metric, Selected) else metric
        if not isinstance(measured, Metric) and not callable(measured):
            raise UserError(
                f"metric.{stage}.{name} is neither a torchmetrics.Metric nor a function"
            )
    return as_metrics(named, stage)


def make_callbacks(
    config: Config, build: Build, folder: Path, model: nn.Module, job: Job
) -> list[Callback]:
    """Those who watch.

    Raises:
        UserError: One is no callback.
    """
    offers = {"folder": folder, "model": model, "config": job.plain}
    found = build.named("callbacks", config.callbacks, **offers)
    for name, callback in found.items():
        if not isinstance(callback, Callback):
            raise UserError(f"callbacks.{name} is no app.training.events.Callback")
    return list(found.values())
