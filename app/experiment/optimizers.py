"""Build the optimizers of a job and their learning rate schedules."""

from __future__ import annotations

import logging
from typing import NamedTuple

from torch import nn
from torch.optim import Optimizer

from app.config.instantiate import Instantiator
from app.config.optimizers import optimizer_nodes, per_group_rates
from app.config.rules import FUSED_OPTIMIZERS
from app.config.schema import Config, Node
from app.config.validate import fill_auto, has_auto
from app.distributed.strategies import SingleDevice
from app.experiment.factory import Components, make_limits
from app.experiment.optimizer_parts import part_name
from app.runtime.errors import UserError
from app.training.optim.chained_optimizer import ChainedOptimizer
from app.training.optim.lr_schedule import LRSchedule
from app.training.optim.optim_wrapper import OptimWrapper, OptimWrapperDict
from app.training.optim.parameter_groups import scale_learning_rates
from app.training.optim.parameter_selection import output_layer

log = logging.getLogger(__name__)


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
        UserError: An optimizer or a schedule cannot be built.
    """
    if use_scheduler:
        _warn_about_few_steps(config, components.loaders["train"].num_batches)
    wrappers = {
        part_name(key): _make_optim_wrapper(
            config, instantiator, components, strategy, key, use_scheduler
        )
        for key in components.optimizer_parts
    }
    return OptimWrapperDict(wrappers, config.trainer.on_nonfinite if use_scheduler else None)


def _make_optim_wrapper(
    config: Config,
    instantiator: Instantiator,
    components: Components,
    strategy: SingleDevice,
    key: str,
    use_scheduler: bool,
) -> OptimWrapper:
    trainer, parts = config.trainer, components.optimizer_parts
    # A strategy for several devices may have replaced parameters by their shards.
    parameters = components.task.parameters()
    optimizer = _make_optimizer(config, instantiator, components, key, parameters)
    num_batches = components.loaders["train"].num_batches
    names = {name for part in parts[key] for group in part.groups for name in group["param_names"]}
    own = {name: parameter for name, parameter in parameters.items() if name in names}
    head = output_layer(components.task.model, own)
    return OptimWrapper(
        optimizer,
        _make_lr_schedule(config, instantiator, optimizer, num_batches) if use_scheduler else None,
        components.task.precision.grad_scaler(),
        config.data.batch_size,
        trainer.accumulate_grad_batches,
        trainer.gradient_clip_norm,
        trainer.gradient_clip_value,
        len(parts) == 1,
        trainer.gradient_norm,
        trainer.zero_non_finite_gradients,
        strategy,
        trainer.gradient_clip_agc,
        list(head.parameters()) if head else [],
    )


def _make_optimizer(
    config: Config,
    instantiator: Instantiator,
    components: Components,
    key: str,
    parameters: dict[str, nn.Parameter],
) -> Optimizer:
    optimizers = []
    for part in components.optimizer_parts[key]:
        fused = _fused_option(config, part.node, components)
        optimizer = instantiator(part.key, part.node, part.groups_of(parameters), **fused)
        if not isinstance(optimizer, Optimizer):
            raise UserError(f"{part.key} is not a torch.optim.Optimizer")
        optimizers.append(optimizer)
    optimizer = optimizers[0] if len(optimizers) == 1 else ChainedOptimizer(optimizers)
    scale_learning_rates(optimizer.param_groups, optimizer_nodes(config.optimizer)[key].get("lr"))
    return optimizer


def _fused_option(config: Config, node: Node, components: Components) -> dict[str, bool]:
    """Select the fused kernel, which is faster, and on CUDA can skip a step without waiting."""
    user_choice = {"fused", "foreach", "differentiable", "capturable"} & node.keys()
    has_fused = node["_target_"] in {f"torch.optim.{name}" for name in FUSED_OPTIMIZERS}
    has_fused = has_fused and not node.get("dampening")  # see `fill_momentum_buffers`
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
