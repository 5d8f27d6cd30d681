"""The parts that a configuration names, put together; below here nobody knows of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torchmetrics import Metric

from app.batches import STAGES, make_datasets, make_loaders
from app.callbacks.callback import Callback
from app.config.build import Build
from app.config.check import fill_auto
from app.config.errors import UserError
from app.config.schema import Config, Data
from app.data.loaders import Batches
from app.device import Precision, memory_format
from app.losses.term import Term, WeightedSum
from app.metrics.measure import StageMetrics
from app.optimization import Optimization
from app.schedule import Schedule
from app.seed import seed_everything
from app.task import SupervisedTask
from app.trainer import Plan


@dataclass(frozen=True)
class Parts:
    """What every mode needs.

    Attributes:
        task: The steps, its model on the device.
        loaders: The batches of each stage that has data and is wanted.
        device: That all runs on.
    """

    task: SupervisedTask
    loaders: dict[str, Batches]
    device: torch.device


def make_parts(config: Config, build: Build, device: torch.device) -> Parts:
    """The model, the data and the steps, tried on two samples.

    Raises:
        UserError: A part cannot be built, or they do not fit together.
    """
    model = make_model(config, build, device)
    format_ = memory_format(config.trainer.channels_last, model)
    loaders = make_loaders(config, build, make_datasets(config, build), device, format_)
    task = make_task(config, build, model, device)
    for stage, loader in loaders.items():
        try_on(task, stage, loader, config.data)
    if config.trainer.compile:
        model.compile()
    return Parts(task, loaders, device)


@torch.no_grad()
def try_on(task: SupervisedTask, stage: str, loader: Batches, data: Data) -> None:
    """Puts two samples through the model, the loss and the metrics.

    Raises:
        UserError: Names the part that does not fit the others, and the shapes.
    """
    inputs, targets = loader.first(2)
    shape = list(inputs.shape[1:])
    if shape != data.input_shape:
        raise UserError(
            f"data.input_shape={data.input_shape}, but the {stage} samples are of shape {shape}"
        )
    task.model.eval()
    try:
        with task.precision.autocast():
            outputs = task.model(inputs)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        name = type(task.model).__name__
        raise UserError(f"model: {name} cannot take samples of shape {shape}: {error}") from error
    if data.num_classes is not None and outputs.shape[1] != data.num_classes:
        raise UserError(
            f"data.num_classes={data.num_classes}, but the model gives {outputs.shape[1]} outputs"
        )
    try:
        task.eval_step(stage, (inputs, targets))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise UserError(
            f"loss or metric.{stage}: cannot take outputs of shape {list(outputs.shape)} and "
            f"{targets.dtype} targets of shape {list(targets.shape)}: {error}"
        ) from error


def make_model(config: Config, build: Build, device: torch.device) -> nn.Module:
    """The model on the device; its first weights depend on the seed alone.

    Raises:
        UserError: What is built is no module.
    """
    seed_everything(config.seed, "model")
    model = build("model", config.model)
    if not isinstance(model, nn.Module):
        raise UserError(f"model: {config.model['_target_']} is no torch.nn.Module")
    format_ = memory_format(config.trainer.channels_last, model)
    return model.to(device=device, memory_format=format_)  # type: ignore[call-overload,no-any-return]


def make_task(
    config: Config, build: Build, model: nn.Module, device: torch.device
) -> SupervisedTask:
    """The steps, for now without learning.

    Raises:
        UserError: A loss is no term, or a metric none of torchmetrics.
    """
    terms = build.named("loss", config.loss)
    for name, term in terms.items():
        if not isinstance(term, Term):
            raise UserError(f"loss.{name}._target_ must be app.losses.term.Term")
    metrics = {
        stage: build.named(f"metric.{stage}", getattr(config.metric, stage)) for stage in STAGES
    }
    for stage, named in metrics.items():
        for name, metric in named.items():
            if not isinstance(metric, Metric):
                raise UserError(f"metric.{stage}.{name} is no torchmetrics.Metric")
            metric.to(device)
    return SupervisedTask(
        model,
        WeightedSum(terms).to(device),
        {stage: StageMetrics(named) for stage, named in metrics.items()},
        Precision.choose(config.trainer.precision, device),
    )


def make_optimization(config: Config, build: Build, parts: Parts) -> Optimization:
    """The optimizer of the model's parameters, with its schedule."""
    trainer = config.trainer
    wanted = [p for p in parts.task.model.parameters() if p.requires_grad]
    optimizer = build("optimizer", config.optimizer, wanted)
    return Optimization(
        optimizer,
        _schedule(config, build, optimizer, len(parts.loaders["train"])),
        parts.task.precision.scaler(),
        config.data.batch_size,
        trainer.accumulate_grad_batches,
        trainer.gradient_clip_norm,
        trainer.gradient_clip_value,
    )


def _schedule(
    config: Config, build: Build, optimizer: torch.optim.Optimizer, batches: int
) -> Schedule:
    wanted, plan = config.scheduler, make_plan(config)
    steps_per_epoch = -(-batches // config.trainer.accumulate_grad_batches)
    epochs = plan.epochs(steps_per_epoch)
    per_epoch = wanted.interval == "epoch"
    total = epochs if per_epoch else plan.max_steps or epochs * steps_per_epoch
    node = fill_auto(wanted.lr_scheduler, total)
    inner = build("scheduler.lr_scheduler", node, optimizer) if node else None
    return Schedule(optimizer, inner, per_epoch, wanted.warmup_steps)


def make_plan(config: Config) -> Plan:
    """How long to train, and what comes when."""
    trainer = config.trainer
    return Plan(
        max_epochs=1 if trainer.fast_dev_run else trainer.max_epochs,
        max_steps=trainer.max_steps,
        valid_every_n_epochs=trainer.valid_every_n_epochs,
        save_every_n_epochs=config.checkpoint.every_n_epochs,
        sanity_valid_batches=trainer.sanity_valid_batches,
    )


def make_callbacks(config: Config, build: Build, folder: Path) -> list[Callback]:
    """Those who watch.

    Raises:
        UserError: One is no callback.
    """
    found = build.named("callbacks", config.callbacks, folder=folder)
    for name, callback in found.items():
        if not isinstance(callback, Callback):
            raise UserError(f"callbacks.{name} is no app.callbacks.callback.Callback")
    return list(found.values())
