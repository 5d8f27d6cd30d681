"""Build the optimizers of a job: parameter groups, learning rate schedules, and their checks."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from app.config.allowlist import TARGET
from app.config.instantiate import Instantiator
from app.config.optimizers import (
    group_arguments,
    optimizer_arguments,
    optimizer_nodes,
    optimizer_options,
    per_group_rates,
)
from app.config.schema import Config, Node
from app.config.validate import fill_auto, has_auto
from app.distributed.strategies import SingleDevice
from app.experiment.factory import Components, make_limits
from app.runtime.errors import UserError, did_you_mean, join_choices
from app.training.model_summary import (
    IMPLEMENTATION_OPTIONS,
)
from app.training.optim.chained_optimizer import ChainedOptimizer
from app.training.optim.finite_check import FUSED_OPTIMIZERS
from app.training.optim.lr_schedule import LRSchedule
from app.training.optim.optim_wrapper import SINGLE, OptimWrapper, OptimWrapperDict
from app.training.optim.parameter_groups import (
    batch_size_factor,
    make_param_groups,
    scale_learning_rates,
)
from app.training.optim.parameter_selection import output_layer

log = logging.getLogger(__name__)


def trained_parameters(components: Components) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained in some epoch, by name."""
    return {
        name: parameter
        for name, parameter in components.task.parameters().items()
        if parameter.requires_grad and not components.freezing.is_always_frozen(name)
    }


def parameters_of(key: str, trained: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return what the optimizer at a key of the configuration trains, by name."""
    part = _part_of(key)
    return {n: p for n, p in trained.items() if part == SINGLE or n.startswith(f"{part}.")}


def _part_of(key: str) -> str:
    """Return the part of the model that the optimizer at a key trains."""
    return key.partition(".")[2] or SINGLE


def make_optimizers(
    config: Config,
    instantiator: Instantiator,
    components: Components,
    strategy: SingleDevice,
    use_scheduler: bool = True,
) -> OptimWrapperDict:
    """Build one optimizer for all trainable parameters, or one for each named part of the model.

    Args:
        config: The full configuration.
        instantiator: Builds the optimizers and schedulers.
        components: The task, the loaders and the freeze schedule.
        strategy: Reduces the gradients of several ranks.
        use_scheduler: Whether learning rates follow the schedule. Without it, steps with a
            non-finite loss do not end the training either, as the tuners need.

    Raises:
        UserError: An optimizer has no parameters, or a parameter no optimizer.
    """
    trainable = trained_parameters(components)
    nodes = optimizer_nodes(config.optimizer)
    names = {key: _part_of(key) for key in nodes}
    groups = {key: parameters_of(key, trainable) for key in nodes}
    _check_groups(groups, trainable, names)
    if use_scheduler:
        _warn_about_few_steps(config, components.loaders["train"].num_batches)
    wrappers = {
        names[key]: _make_optim_wrapper(
            config, instantiator, components, strategy, key, groups[key], use_scheduler
        )
        for key in nodes
    }
    return OptimWrapperDict(wrappers, config.trainer.on_nonfinite if use_scheduler else None)


def _check_groups(
    groups: dict[str, dict[str, nn.Parameter]],
    trainable: dict[str, nn.Parameter],
    names: dict[str, str],
) -> None:
    """Check that every optimizer has parameters and every trainable parameter an optimizer."""
    modules = sorted({name.partition(".")[0] for name in trainable})
    for key, parameters in groups.items():
        if not parameters and not trainable:
            raise UserError(f"{key}: nothing to train: all parameters are frozen")
        if not parameters:
            raise UserError(
                f"{key} has no parameters: {names[key]!r} is not a trainable part of the model; "
                f"allowed: {join_choices(modules)}{did_you_mean(names[key], modules)}"
            )
    assigned = {name for parameters in groups.values() for name in parameters}
    unassigned = [name for name in trainable if name not in assigned]
    if unassigned:
        raise UserError(
            f"optimizer: no optimizer for {unassigned[0]!r}; each of these parts of the model "
            f"needs an optimizer or has to be frozen: {join_choices(modules)}"
        )


def _make_optim_wrapper(
    config: Config,
    instantiator: Instantiator,
    components: Components,
    strategy: SingleDevice,
    key: str,
    parameters: dict[str, nn.Parameter],
    use_scheduler: bool,
) -> OptimWrapper:
    trainer = config.trainer
    optimizer = _make_optimizer(config, instantiator, components, key, parameters)
    num_batches = components.loaders["train"].num_batches
    head = output_layer(components.task.model, parameters)
    return OptimWrapper(
        optimizer,
        _make_lr_schedule(config, instantiator, optimizer, num_batches) if use_scheduler else None,
        components.task.precision.grad_scaler(),
        config.data.batch_size,
        trainer.accumulate_grad_batches,
        trainer.gradient_clip_norm,
        trainer.gradient_clip_value,
        len(optimizer_nodes(config.optimizer)) == 1,
        trainer.gradient_norm,
        trainer.zero_non_finite_gradients,
        strategy,
        trainer.gradient_clip_agc,
        list(head.parameters()) if head else [],
    )


class OptimizerPart(NamedTuple):
    """An optimizer that trains some of the groups at a key of the configuration."""

    key: str
    node: Node
    groups: list[dict[str, Any]]


def optimizer_parts(
    config: Config, components: Components, key: str, parameters: dict[str, nn.Parameter]
) -> list[OptimizerPart]:
    """Divide parameters into groups, and these by the optimizer that trains them."""
    node = optimizer_nodes(config.optimizer)[key]
    options, arguments = optimizer_options(node), group_arguments(node)
    own = {name: given for name, given in arguments.items() if TARGET in given}
    shared = {name: given for name, given in arguments.items() if name not in own}
    batch_size = config.data.batch_size * config.trainer.accumulate_grad_batches
    factor = batch_size_factor(options, batch_size)
    groups = make_param_groups(key, components.task.model, parameters, options, shared, factor)
    parts = [
        OptimizerPart(
            key, optimizer_arguments(node), [group for group in groups if group["name"] not in own]
        ),
        *(
            OptimizerPart(
                f"{key}.groups.{name}", given, [group for group in groups if group["name"] == name]
            )
            for name, given in own.items()
        ),
    ]
    return [part for part in parts if part.groups]


def _make_optimizer(
    config: Config,
    instantiator: Instantiator,
    components: Components,
    key: str,
    parameters: dict[str, nn.Parameter],
) -> Optimizer:
    optimizers = []
    for part in optimizer_parts(config, components, key, parameters):
        fused = _fused_option(config, part.node, components)
        optimizer = instantiator(part.key, part.node, part.groups, **fused)
        if not isinstance(optimizer, Optimizer):
            raise UserError(f"{part.key} is not a torch.optim.Optimizer")
        check_step(instantiator, part, components.task.model)
        optimizers.append(optimizer)
    optimizer = optimizers[0] if len(optimizers) == 1 else ChainedOptimizer(optimizers)
    scale_learning_rates(optimizer.param_groups, optimizer_nodes(config.optimizer)[key].get("lr"))
    return optimizer


def check_step(instantiator: Instantiator, part: OptimizerPart, model: nn.Module) -> None:
    """Step with small parameters that stand for the real ones: as many dimensions, as sparse.

    Only optimizers of torch are tried; others may refuse parameters as small as these.

    Raises:
        UserError: The optimizer refuses dense or sparse gradients.
    """
    if not part.node[TARGET].startswith("torch.optim."):
        return
    embeddings = (m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)))
    sparse = {id(embedding.weight) for embedding in embeddings if embedding.sparse}
    kinds: dict[tuple[int, bool], str] = {}
    for group in part.groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            kinds.setdefault((parameter.ndim, id(parameter) in sparse), name)
    for (ndim, is_sparse), name in kinds.items():
        stand_in = nn.Parameter(torch.zeros((1,) * ndim))
        stand_in.grad = stand_in.detach().to_sparse(1) if is_sparse else torch.zeros_like(stand_in)
        try:
            instantiator(part.key, without_implementation(part.node), [stand_in]).step()
        except RuntimeError as error:
            kind = "sparse" if is_sparse else "dense"
            raise UserError(
                f"{part.key}: {part.node[TARGET]} cannot train {name!r}, whose gradients are "
                f"{kind}: {error}"
            ) from error


def without_implementation(node: Node) -> Node:
    """Return the node of an optimizer without what depends on the device."""
    return {name: value for name, value in node.items() if name not in IMPLEMENTATION_OPTIONS}


def _fused_option(config: Config, node: Node, components: Components) -> dict[str, bool]:
    """Select the fused kernel, which is faster, and on CUDA can skip a step without waiting."""
    user_choice = {"fused", "foreach", "differentiable", "capturable"} & node.keys()
    has_fused = node["_target_"] in {f"torch.optim.{name}" for name in FUSED_OPTIMIZERS}
    has_sparse = any(getattr(m, "sparse", False) for m in components.task.model.modules())
    can_fuse = components.device.type in ("cuda", "cpu") and config.trainer.strategy != "fsdp"
    return {"fused": True} if can_fuse and has_fused and not (user_choice or has_sparse) else {}


def _make_lr_schedule(
    config: Config, instantiator: Instantiator, optimizer: Optimizer, num_batches: int | None
) -> LRSchedule:
    scheduler, length = config.scheduler, _run_length(config, num_batches)
    per_epoch = scheduler.interval == "epoch"
    total = length.epochs if per_epoch else length.steps
    if total is None and has_auto(scheduler.lr_scheduler):
        raise UserError(
            "scheduler.lr_scheduler: 'auto' is the length of the run, which is unknown for this "
            "data; set a number, trainer.max_steps with scheduler.interval=step, or "
            "scheduler=constant"
        )
    node = fill_auto(scheduler.lr_scheduler, total or 1)
    node = per_group_rates(node, [group["lr_scale"] for group in optimizer.param_groups])
    lr_scheduler = instantiator("scheduler.lr_scheduler", node, optimizer) if node else None
    return LRSchedule(optimizer, lr_scheduler, per_epoch, _warmup_steps(config, length))


class RunLength(NamedTuple):
    """Maximum length of a run in epochs and optimizer steps; None is unknown."""

    epochs: int | None
    steps: int | None
    steps_per_epoch: int | None


def _run_length(config: Config, num_batches: int | None) -> RunLength:
    limits, accumulate = make_limits(config), config.trainer.accumulate_grad_batches
    per_epoch = None if num_batches is None else -(-num_batches // accumulate)
    epochs = limits.num_epochs(per_epoch)
    in_epochs = epochs * per_epoch if epochs and per_epoch else None
    steps = [number for number in (limits.max_steps, in_epochs) if number is not None]
    return RunLength(epochs, min(steps, default=None), per_epoch)


def _warmup_steps(config: Config, length: RunLength) -> int:
    """Return the number of warm-up steps, given as such, in epochs, or as a share of the run.

    Raises:
        UserError: It is in epochs or a share, and the length of an epoch or the run is unknown.
    """
    warmup, epochs = config.scheduler.warmup_steps, config.scheduler.warmup_epochs
    if epochs is not None:
        if length.steps_per_epoch is None:
            raise UserError(
                f"scheduler.warmup_epochs={epochs}: the number of steps in an epoch is unknown "
                "for this data; set scheduler.warmup_steps instead"
            )
        return round(epochs * length.steps_per_epoch)
    if isinstance(warmup, int):
        return warmup
    if length.steps is None:
        raise UserError(
            f"scheduler.warmup_steps={warmup} is a share of the run's steps, whose number is "
            "unknown for this data; set a number of steps, or trainer.max_steps"
        )
    return round(warmup * length.steps)


def _warn_about_few_steps(config: Config, num_batches: int | None) -> None:
    """Log that a run hardly trains: long warm-up, or a single optimizer step per epoch."""
    length = _run_length(config, num_batches)
    if config.trainer.fast_dev_run or length.steps is None:
        return
    warmup = _warmup_steps(config, length)
    if warmup >= length.steps / 2:
        key = "warmup_steps" if config.scheduler.warmup_epochs is None else "warmup_epochs"
        log.warning(
            "scheduler.%s=%s: the learning rate rises during %d of the run's %d "
            "optimizer steps; set fewer, or warmup_steps as a share of the run such as 0.1",
            key,
            getattr(config.scheduler, key),
            min(warmup, length.steps),
            length.steps,
        )
    if length.steps_per_epoch == 1:
        log.warning(
            "an epoch is a single optimizer step, so that the run has %d; a smaller "
            "data.batch_size=%d gives more",
            length.steps,
            config.data.batch_size,
        )
