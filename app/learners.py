"""What learns, from its nodes: optimizers, schedules, averages, and for how long."""

from __future__ import annotations

import inspect

from torch import nn
from torch.optim import Optimizer

from app.config.instantiate import Build
from app.config.rules import seconds_of
from app.config.schema import Checkpoint, Config, Node
from app.config.validate import fill_auto, has_auto, optimizer_nodes
from app.distributed.collectives import alone
from app.distributed.strategies import Parallel, Replicated, Sharded
from app.parts import Parts
from app.runtime.errors import UserError, nearest, one_of
from app.training.optim.finite_check import FUSED
from app.training.optim.lr_schedule import Schedule
from app.training.optim.optim_wrapper import ONLY, Learning, Optimization
from app.training.optim.weight_averaging import Averaging
from app.training.plan import Plan, Saving
from app.training.supervised import SupervisedTask


def make_parallel(config: Config, parts: Parts) -> Parallel:
    """How several ranks learn as one; from now on the task trains through it."""
    task, trainer = parts.task, config.trainer
    if alone():
        return Parallel(task.model)
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
                "app.training.supervised.SupervisedTask does, and a single optimizer; allowed here: ddp"
            )
        return Sharded(task.model)
    single = len(optimizer_nodes(config.optimizer)) == 1
    found = Replicated(task.model, parts.device, single, trainer.find_unused_parameters)
    task.trained = found
    return found


def make_learning(
    config: Config, build: Build, parts: Parts, parallel: Parallel, scheduled: bool = True
) -> Learning:
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
    return Learning(
        {
            names[key]: _optimization(config, build, parts, parallel, key, groups[key], scheduled)
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


def _optimization(
    config: Config,
    build: Build,
    parts: Parts,
    parallel: Parallel,
    key: str,
    parameters: list[nn.Parameter],
    scheduled: bool,
) -> Optimization:
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
    return Optimization(
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


def _fused(config: Config, node: Node, parts: Parts) -> dict[str, bool]:
    """On a CUDA device one kernel for a step, which needs no waiting to be left out."""
    own_choice = {"fused", "foreach", "differentiable", "capturable"} & node.keys()
    known = node["_target_"] in {f"torch.optim.{name}" for name in FUSED}
    sparse = any(getattr(module, "sparse", False) for module in parts.task.model.modules())
    on_cuda = parts.device.type == "cuda" and config.trainer.strategy != "fsdp"
    return {"fused": True} if on_cuda and known and not (own_choice or sparse) else {}


def _schedule(config: Config, build: Build, optimizer: Optimizer, batches: int | None) -> Schedule:
    wanted, plan = config.scheduler, make_plan(config)
    accumulate = config.trainer.accumulate_grad_batches
    steps_per_epoch = None if batches is None else -(-batches // accumulate)
    epochs, per_epoch = plan.epochs(steps_per_epoch), wanted.interval == "epoch"
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
        raise UserError("average is no app.training.optim.weight_averaging.Averaging")
    return averaging


def make_plan(config: Config) -> Plan:
    """How long to train, and what comes when."""
    trainer = config.trainer
    return Plan(
        max_epochs=1 if trainer.fast_dev_run else trainer.max_epochs,
        max_steps=trainer.max_steps,
        valid_every_n_epochs=trainer.valid_every_n_epochs,
        saving=_saving(config.checkpoint),
        sanity_valid_batches=trainer.sanity_valid_batches,
        max_seconds=seconds_of(trainer.max_time),
    )


def _saving(checkpoint: Checkpoint) -> Saving:
    return Saving(
        every_n_epochs=checkpoint.every_n_epochs,
        every_n_steps=checkpoint.every_n_steps,
        every_n_minutes=checkpoint.every_n_minutes,
        keep_last=checkpoint.keep_last,
        save_top_k=checkpoint.save_top_k,
        in_background=checkpoint.asynchronous,
    )
