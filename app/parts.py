"""The parts that a configuration names, put together; below here nobody knows of it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric

from app.averaging import Averaging
from app.batches import STAGES, make_datasets, make_loaders
from app.callbacks.callback import Callback
from app.config.build import Build
from app.config.check import fill_auto, has_auto, optimizer_nodes
from app.config.errors import UserError, nearest, one_of
from app.config.schema import Config, Data, Job
from app.data.loaders import Batches
from app.device import Precision, memory_format
from app.freezing import Freezing
from app.learning import ONLY, Learning
from app.losses.term import Term, WeightedSum
from app.metrics.measure import StageMetrics, as_metrics
from app.metrics.selected import Selected
from app.nested import pick
from app.optimization import Optimization
from app.schedule import Schedule
from app.seed import seed_everything
from app.task import SupervisedTask, Task, sound
from app.trainer import PREDICT, Plan


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
    format_ = memory_format(config.trainer.channels_last, model)
    loaders = make_loaders(config, build, make_datasets(config, build), device, format_)
    task = make_task(config, build, model, device)
    for stage, loader in loaders.items():
        try_on(task, stage, loader, config.data)
    frozen = {name: freeze for name, freeze in config.freeze.items() if freeze is not None}
    freezing = Freezing(model, frozen)
    if config.trainer.compile:
        model.compile()
    return Parts(task, loaders, freezing, device)


def try_on(task: Task, stage: str, loader: Batches, data: Data) -> None:
    """Puts two samples through the step: the model, the loss and the metrics.

    Raises:
        UserError: Names the part that does not fit the others, and the shapes.
    """
    batch = loader.first(2)
    if isinstance(task, SupervisedTask):
        if stage == "train" or task.patches is None:
            _check_shape(pick(batch, task.inputs), stage, data)
    elif stage == "train":
        return
    task.model.eval()
    try:
        looked_over = nullcontext() if stage == PREDICT else task.metrics[stage].strict()
        with torch.no_grad(), task.precision.autocast(), warnings.catch_warnings(), looked_over:
            # (N, 1) against (N,) is spread to (N, N): a loss, but never the one that was meant.
            warnings.filterwarnings("error", "Using a target size")
            if isinstance(task, SupervisedTask):
                _check_classes(task.predict_step(batch), data)
            elif stage == PREDICT:
                task.predict_step(batch)
            if stage != PREDICT:
                sound(task, stage, task.eval_step(stage, batch))
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"task: {type(task).__name__} cannot take {stage} data: {reason}"
        ) from error


def _check_classes(outputs: object, data: Data) -> None:
    given = outputs.shape[1] if isinstance(outputs, Tensor) and outputs.ndim > 1 else None
    if data.num_classes is not None and given not in (None, data.num_classes):
        raise UserError(f"data.num_classes={data.num_classes}, but the model gives {given} outputs")


def _check_shape(inputs: object, stage: str, data: Data) -> None:
    shape = list(inputs.shape[1:]) if isinstance(inputs, Tensor) else None
    if shape is not None and shape != data.input_shape:
        raise UserError(
            f"data.input_shape={data.input_shape}, but the {stage} samples are of shape {shape}"
        )


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
        raise UserError(f"task._target_={config.task['_target_']!r} is no app.task.Task")
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
            raise UserError(f"loss.{name}._target_ must be app.losses.term.Term")
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


def make_learning(config: Config, build: Build, parts: Parts) -> Learning:
    """An optimizer of all parameters that learn, or one for each part of the model it names.

    Raises:
        UserError: An optimizer is left without parameters, or parameters without an optimizer.
    """
    learnable = {
        name: parameter
        for name, parameter in parts.task.parameters().items()
        if parameter.requires_grad and not parts.freezing.forever(name)
    }
    nodes = optimizer_nodes(config.optimizer)
    names = {key: key.partition(".")[2] or ONLY for key in nodes}
    groups = {
        key: [p for n, p in learnable.items() if name == ONLY or n.startswith(f"{name}.")]
        for key, name in names.items()
    }
    _check_groups(groups, learnable, names)
    alone = len(nodes) == 1
    return Learning(
        {names[key]: _optimization(config, build, parts, key, groups[key], alone) for key in nodes}
    )


def _check_groups(
    groups: dict[str, list[nn.Parameter]], learnable: dict[str, nn.Parameter], names: dict[str, str]
) -> None:
    parts = sorted({name.partition(".")[0] for name in learnable})
    for key, parameters in groups.items():
        if not parameters and not learnable:
            raise UserError(f"{key}: there is nothing to learn: all parameters are frozen")
        if not parameters:
            raise UserError(
                f"{key} has no parameters: {names[key]!r} is no part of the model that learns; "
                f"parts: {one_of(parts)}{nearest(names[key], parts)}"
            )
    held = {id(parameter) for parameters in groups.values() for parameter in parameters}
    left = [name for name, parameter in learnable.items() if id(parameter) not in held]
    if left:
        raise UserError(
            f"optimizer: no optimizer has {left[0]!r}; each part of the model that learns needs "
            f"one, or a freeze: {one_of(parts)}"
        )


def _optimization(
    config: Config,
    build: Build,
    parts: Parts,
    key: str,
    parameters: list[nn.Parameter],
    alone: bool,
) -> Optimization:
    trainer = config.trainer
    optimizer = build(key, optimizer_nodes(config.optimizer)[key], parameters)
    if not isinstance(optimizer, Optimizer):
        raise UserError(f"{key} is no torch.optim.Optimizer")
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UserError(
            f"{key}: {type(optimizer).__name__} measures the loss again in each step (a closure), "
            "which is not possible here"
        )
    return Optimization(
        optimizer,
        _schedule(config, build, optimizer, parts.loaders["train"].num_batches),
        parts.task.precision.scaler(),
        config.data.batch_size,
        trainer.accumulate_grad_batches,
        trainer.gradient_clip_norm,
        trainer.gradient_clip_value,
        alone,
        trainer.gradient_norm,
        trainer.zero_non_finite_gradients,
    )


def _schedule(config: Config, build: Build, optimizer: Optimizer, batches: int | None) -> Schedule:
    wanted, plan = config.scheduler, make_plan(config)
    accumulate = config.trainer.accumulate_grad_batches
    steps_per_epoch = None if batches is None else -(-batches // accumulate)
    epochs, per_epoch = plan.epochs(steps_per_epoch), wanted.interval == "epoch"
    by_epochs = epochs * steps_per_epoch if epochs and steps_per_epoch else None
    total = epochs if per_epoch else plan.max_steps or by_epochs
    if total is None and has_auto(wanted.lr_scheduler):
        raise UserError(
            "scheduler.lr_scheduler: 'auto' is the length of the run, which is not known for this "
            "data; give a number, or trainer.max_steps with scheduler.interval=step"
        )
    node = fill_auto(wanted.lr_scheduler, total or 1)
    inner = build("scheduler.lr_scheduler", node, optimizer) if node else None
    return Schedule(optimizer, inner, per_epoch, wanted.warmup_steps)


def make_averaging(config: Config, build: Build, model: nn.Module) -> Averaging:
    """The average of the weights, or the weights themselves.

    Raises:
        UserError: It is none.
    """
    if config.average is None:
        return Averaging(model)
    averaging = build("average", config.average, model=model)
    if not isinstance(averaging, Averaging):
        raise UserError("average is no app.averaging.Averaging")
    return averaging


def make_plan(config: Config) -> Plan:
    """How long to train, and what comes when."""
    trainer = config.trainer
    return Plan(
        max_epochs=1 if trainer.fast_dev_run else trainer.max_epochs,
        max_steps=trainer.max_steps,
        valid_every_n_epochs=trainer.valid_every_n_epochs,
        save_every_n_epochs=config.checkpoint.every_n_epochs,
        sanity_valid_batches=trainer.sanity_valid_batches,
        stop_at_non_finite_loss=trainer.stop_at_non_finite_loss,
    )


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
            raise UserError(f"callbacks.{name} is no app.callbacks.callback.Callback")
    return list(found.values())
