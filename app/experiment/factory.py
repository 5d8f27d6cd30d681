"""The parts that a configuration names, put together; below here nobody knows of it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torchmetrics import Metric

from app.config.instantiate import Instantiator
from app.config.rules import seconds_of
from app.config.schema import CheckpointConfig, Config, Job, Node
from app.config.validate import fill_auto, has_auto, optimizer_nodes
from app.data.batch import BatchLoader
from app.data.datamodule import STAGES, make_datasets, make_loaders
from app.distributed.collectives import is_distributed, rank_zero_first
from app.distributed.strategies import DDPStrategy, FSDPStrategy, SingleDevice
from app.distributed.sync_batchnorm import convert_sync_batchnorm
from app.experiment.dry_run import dry_run
from app.losses.weighted_sum import Term, WeightedSum
from app.metrics.output_metric import OutputMetric
from app.metrics.stage_metrics import StageMetrics, as_metrics
from app.runtime.errors import UserError, nearest, one_of
from app.runtime.seed import seed_everything
from app.training.events import Callback
from app.training.optim.finite_check import FUSED
from app.training.optim.freezing import FreezeSchedule
from app.training.optim.lr_schedule import LRSchedule
from app.training.optim.optim_wrapper import ONLY, OptimWrapper, OptimWrapperDict
from app.training.optim.weight_averaging import WeightAveraging
from app.training.plan import SaveSchedule, TrainingLimits
from app.training.precision import Precision, memory_format
from app.training.supervised import SupervisedTask
from app.training.task import Task


@dataclass(frozen=True)
class Components:
    """What every mode needs.

    Attributes:
        task: The steps, its model on the device.
        loaders: The batches of each stage that has data and is wanted.
        freezing: Of the model's parameters.
        device: That all runs on.
    """

    task: Task
    loaders: dict[str, BatchLoader]
    freezing: FreezeSchedule
    device: torch.device


def make_components(config: Config, build: Instantiator, device: torch.device) -> Components:
    """The model, the data and the steps, tried on two samples.

    Raises:
        UserError: A part cannot be built, or they do not fit together.
    """
    model = make_model(config, build, device)
    format_ = _format(config, model)
    with rank_zero_first():
        datasets = make_datasets(config, build)
    loaders = make_loaders(config, build, datasets, device, format_)
    task = make_task(config, build, model, device)
    for stage, loader in loaders.items():
        dry_run(task, stage, loader, config.data)
    frozen = {name: freeze for name, freeze in config.freeze.items() if freeze is not None}
    freezing = FreezeSchedule(model, frozen)
    if config.trainer.compile:
        model.compile()
    return Components(task, loaders, freezing, device)


def make_model(config: Config, build: Instantiator, device: torch.device) -> nn.Module:
    """The model on the device; its first weights depend on the seed alone.

    Raises:
        UserError: What is built is no module.
    """
    seed_everything(config.seed, "model")
    model = build("model", config.model)
    if not isinstance(model, nn.Module):
        raise UserError(f"model: {config.model['_target_']} is no torch.nn.Module")
    if config.mode == "train" and config.trainer.sync_batchnorm and is_distributed():
        model = convert_sync_batchnorm(model, device)
    format_ = _format(config, model)
    return model.to(device=device, memory_format=format_)  # type: ignore[call-overload,no-any-return]


def _format(config: Config, model: nn.Module) -> torch.memory_format:
    """Parts of weights must be contiguous."""
    if config.trainer.strategy == "fsdp":
        return torch.contiguous_format
    return memory_format(config.trainer.channels_last, model)


def make_task(config: Config, build: Instantiator, model: nn.Module, device: torch.device) -> Task:
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


def make_loss(config: Config, build: Instantiator) -> WeightedSum:
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


def make_metrics(stage: str, nodes: Mapping[str, Any], build: Instantiator) -> StageMetrics:
    """The metrics of a stage.

    Raises:
        UserError: One is neither of torchmetrics nor a function.
    """
    named = build.named(f"metric.{stage}", dict(nodes))
    for name, metric in named.items():
        measured = metric.metric if isinstance(metric, OutputMetric) else metric
        if not isinstance(measured, Metric) and not callable(measured):
            raise UserError(
                f"metric.{stage}.{name} is neither a torchmetrics.Metric nor a function"
            )
    return as_metrics(named, stage)


def make_callbacks(
    config: Config, build: Instantiator, folder: Path, model: nn.Module, job: Job
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


def make_strategy(config: Config, parts: Components) -> SingleDevice:
    """How several ranks learn as one; from now on the task trains through it."""
    task, trainer = parts.task, config.trainer
    if not is_distributed():
        return SingleDevice(task.model)
    for module in task.loss.modules() if isinstance(task, SupervisedTask) else ():
        if getattr(module, "reduction", "mean") == "sum":
            raise UserError(
                f"loss: {type(module).__name__} with reduction='sum' depends on how many devices "
                "there are; allowed on several: mean"
            )
    if trainer.strategy == "fsdp":
        single = len(optimizer_nodes(config.optimizer)) == 1
        if not (isinstance(task, SupervisedTask) and single):
            raise UserError(
                "trainer.strategy='fsdp' needs a task that calls the model as a whole, as "
                "app.training.supervised.SupervisedTask does, and a single optimizer; "
                "allowed here: ddp"
            )
        return FSDPStrategy(task.model)
    single = len(optimizer_nodes(config.optimizer)) == 1
    found = DDPStrategy(task.model, parts.device, single, trainer.find_unused_parameters)
    task.forward_model = found
    return found


def make_optimizers(
    config: Config,
    build: Instantiator,
    parts: Components,
    parallel: SingleDevice,
    scheduled: bool = True,
) -> OptimWrapperDict:
    """An optimizer of all parameters that learn, or one for each part of the model it names.

    Args:
        config: The whole configuration.
        build: Of nodes.
        parts: The task, the batches of training, what is frozen.
        parallel: Brings the gradients of several ranks together.
        scheduled: Whether learning rates follow the schedule.

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
    return OptimWrapperDict(
        {
            names[key]: _optim_wrapper(config, build, parts, parallel, key, groups[key], scheduled)
            for key in nodes
        },
        config.trainer.on_nonfinite if scheduled else None,  # a search goes on, come what may
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


def _optim_wrapper(
    config: Config,
    build: Instantiator,
    parts: Components,
    parallel: SingleDevice,
    key: str,
    parameters: list[nn.Parameter],
    scheduled: bool,
) -> OptimWrapper:
    trainer = config.trainer
    node = optimizer_nodes(config.optimizer)[key]
    optimizer = build(key, node, parameters, **_fused(config, node, parts))
    if not isinstance(optimizer, Optimizer):
        raise UserError(f"{key} is no torch.optim.Optimizer")
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UserError(
            f"{key}: {type(optimizer).__name__} measures the loss again in each step (a closure), "
            "which is not possible here"
        )
    batches = parts.loaders["train"].num_batches
    return OptimWrapper(
        optimizer,
        _schedule(config, build, optimizer, batches) if scheduled else None,
        parts.task.precision.scaler(),
        config.data.batch_size,
        trainer.accumulate_grad_batches,
        trainer.gradient_clip_norm,
        trainer.gradient_clip_value,
        len(optimizer_nodes(config.optimizer)) == 1,
        trainer.gradient_norm,
        trainer.zero_non_finite_gradients,
        parallel,
    )


def _fused(config: Config, node: Node, parts: Components) -> dict[str, bool]:
    """On a CUDA device one kernel for a step, which needs no waiting to be left out."""
    own_choice = {"fused", "foreach", "differentiable", "capturable"} & node.keys()
    known = node["_target_"] in {f"torch.optim.{name}" for name in FUSED}
    sparse = any(getattr(module, "sparse", False) for module in parts.task.model.modules())
    on_cuda = parts.device.type == "cuda" and config.trainer.strategy != "fsdp"
    return {"fused": True} if on_cuda and known and not (own_choice or sparse) else {}


def _schedule(
    config: Config, build: Instantiator, optimizer: Optimizer, batches: int | None
) -> LRSchedule:
    wanted, plan = config.scheduler, make_limits(config)
    accumulate = config.trainer.accumulate_grad_batches
    steps_per_epoch = None if batches is None else -(-batches // accumulate)
    epochs, per_epoch = plan.num_epochs(steps_per_epoch), wanted.interval == "epoch"
    by_epochs = epochs * steps_per_epoch if epochs and steps_per_epoch else None
    steps = [number for number in (plan.max_steps, by_epochs) if number is not None]
    total = epochs if per_epoch else min(steps, default=None)
    if total is None and has_auto(wanted.lr_scheduler):
        raise UserError(
            "scheduler.lr_scheduler: 'auto' is the length of the run, which is not known for this "
            "data; give a number, trainer.max_steps with scheduler.interval=step, or "
            "scheduler=constant"
        )
    node = fill_auto(wanted.lr_scheduler, total or 1)
    inner = build("scheduler.lr_scheduler", node, optimizer) if node else None
    return LRSchedule(optimizer, inner, per_epoch, wanted.warmup_steps)


def make_averaging(config: Config, build: Instantiator, model: nn.Module) -> WeightAveraging:
    """The average of the weights, or the weights themselves.

    Raises:
        UserError: It is none.
    """
    if config.average is None:
        return WeightAveraging(model)
    averaging = build("average", config.average, model=model)
    if not isinstance(averaging, WeightAveraging):
        raise UserError("average is no app.training.optim.weight_averaging.WeightAveraging")
    return averaging


def make_limits(config: Config) -> TrainingLimits:
    """How long to train, and what comes when."""
    trainer = config.trainer
    return TrainingLimits(
        max_epochs=1 if trainer.fast_dev_run else trainer.max_epochs,
        max_steps=trainer.max_steps,
        valid_every_n_epochs=trainer.valid_every_n_epochs,
        save_schedule=_save_schedule(config.checkpoint),
        sanity_valid_batches=trainer.sanity_valid_batches,
        max_seconds=seconds_of(trainer.max_time),
    )


def _save_schedule(checkpoint: CheckpointConfig) -> SaveSchedule:
    return SaveSchedule(
        every_n_epochs=checkpoint.every_n_epochs,
        every_n_steps=checkpoint.every_n_steps,
        every_n_minutes=checkpoint.every_n_minutes,
        keep_last=checkpoint.keep_last,
        save_top_k=checkpoint.save_top_k,
        in_background=checkpoint.asynchronous,
    )
