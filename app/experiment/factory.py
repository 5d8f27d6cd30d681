"""Build the components of a run from its configuration: model, data, task, optimizers, callbacks.

The modules below this one take plain arguments and never see the configuration.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer
from torchmetrics import Metric

from app.config.allowlist import TARGET
from app.config.instantiate import Instantiator
from app.config.optimizers import (
    group_arguments,
    optimizer_arguments,
    optimizer_nodes,
    optimizer_options,
    per_group_rates,
)
from app.config.rules import CKPT_MODES, parse_duration
from app.config.schema import AUTO, STAGES, CheckpointConfig, CompileConfig, Config, Job, Node
from app.config.validate import fill_auto, has_auto
from app.data.batch import BatchLoader
from app.data.datamodule import make_datasets, make_loaders
from app.data.identity import DataIdentity, identify_data
from app.data.split import sample_paths
from app.distributed.collectives import is_distributed, rank, rank_zero_first
from app.distributed.strategies import DDPStrategy, FSDPStrategy, SingleDevice
from app.distributed.sync_batchnorm import convert_sync_batchnorm
from app.experiment.dry_run import dry_run
from app.losses.weighted_sum import Term, WeightedSum
from app.metrics.output_metric import OutputMetric
from app.metrics.stage_metrics import StageMetrics
from app.runtime.errors import UserError, did_you_mean, join_choices
from app.runtime.seed import seed_everything
from app.training.checkpoint.initial_weights import InitialWeights, load_initial_weights
from app.training.events import Callback
from app.training.gradient_checkpointing import checkpoint_blocks
from app.training.limits import SaveSchedule, TrainingLimits
from app.training.model_summary import (
    IMPLEMENTATION_OPTIONS,
    Summary,
    optimizer_state_bytes,
    summarize_model,
)
from app.training.optim.chained_optimizer import ChainedOptimizer
from app.training.optim.finite_check import FUSED_OPTIMIZERS
from app.training.optim.freezing import FreezeSchedule
from app.training.optim.lr_schedule import LRSchedule
from app.training.optim.optim_wrapper import SINGLE, OptimWrapper, OptimWrapperDict
from app.training.optim.parameter_groups import (
    batch_size_factor,
    make_param_groups,
    scale_learning_rates,
)
from app.training.optim.parameter_selection import output_layer
from app.training.optim.weight_averaging import WeightAveraging
from app.training.precision import Precision, memory_format
from app.training.supervised import SupervisedTask
from app.training.task import Task

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Components:
    """The objects that every mode needs.

    Attributes:
        task: The train and eval steps; holds the model, which is on the device.
        loaders: The batch loader of each stage that the mode runs and that has data.
        paths: The file of each sample of a stage, in order, where samples are files.
        freezing: When which parameters of the model are frozen.
        device: The device of the model and of the batches.
        data: Which data each stage of `loaders` has; on rank 0 only.
        initial: Where the initial weights come from; None if they are random or of a checkpoint.
    """

    task: Task
    loaders: dict[str, BatchLoader]
    paths: dict[str, list[str]]
    freezing: FreezeSchedule
    device: torch.device
    data: dict[str, DataIdentity]
    initial: InitialWeights | None


def make_components(config: Config, instantiator: Instantiator, device: torch.device) -> Components:
    """Build the model, the data and the task, and try them on two samples of each stage.

    Raises:
        UserError: A component cannot be built, or the components do not fit together.
    """
    model = make_model(config, instantiator, device)
    initial = load_init(config, model)
    layout = _memory_format(config, model)
    with rank_zero_first():
        datasets = make_datasets(config, instantiator)
    loaders = make_loaders(config, instantiator, datasets, device, layout)
    task = make_task(config, instantiator, model, device)
    for stage, loader in loaders.items():
        dry_run(task, stage, loader, config.data)
    freezes = {name: freeze for name, freeze in config.freeze.items() if freeze is not None}
    freezing = FreezeSchedule(model, freezes)
    if config.trainer.compile:
        model.compile(**_compile_arguments(config.trainer.compile))
    paths = {stage: paths for stage in loaders if (paths := sample_paths(datasets[stage]))}
    data = {stage: identify_data(datasets[stage]) for stage in loaders if rank() == 0}
    return Components(task, loaders, paths, freezing, device, data, initial)


def make_model(config: Config, instantiator: Instantiator, device: torch.device) -> nn.Module:
    """Build the model on the device; its initial weights depend only on the seed.

    Raises:
        UserError: The target does not build a `torch.nn.Module`.
    """
    seed_everything(config.seed, "model")
    model = instantiator("model", config.model)
    if not isinstance(model, nn.Module):
        raise UserError(f"model: {config.model['_target_']} is not a torch.nn.Module")
    if config.mode == "train" and config.trainer.sync_batchnorm and is_distributed():
        model = convert_sync_batchnorm(model, device)
    Precision.choose(config.trainer.precision, device).convert(model)
    if config.mode not in CKPT_MODES:
        blocks = checkpoint_blocks(model, config.trainer.gradient_checkpointing)
        if blocks:
            log.info("gradient checkpointing of %s", ", ".join(blocks))
    layout = _memory_format(config, model)
    return model.to(device=device, memory_format=layout)  # type: ignore[call-overload,no-any-return]


def _compile_arguments(compile: bool | str | CompileConfig) -> dict[str, Any]:
    if isinstance(compile, CompileConfig):
        return asdict(compile)
    return {"mode": compile} if isinstance(compile, str) else {}


def load_init(config: Config, model: nn.Module) -> InitialWeights | None:
    """Load the initial weights that the configuration names, unless a checkpoint has all of them.

    Raises:
        UserError: The file cannot be read, or no tensor of it fits the model.
    """
    weights, has_checkpoint = config.init.weights, config.resume not in (None, AUTO)
    if weights is None or config.mode in CKPT_MODES or has_checkpoint:
        return None
    return load_initial_weights(model, Path(weights), config.init.skip)


def _memory_format(config: Config, model: nn.Module) -> torch.memory_format:
    if config.trainer.strategy == "fsdp":  # FSDP shards contiguous weights only
        return torch.contiguous_format
    return memory_format(config.trainer.channels_last, model)


def make_task(
    config: Config, instantiator: Instantiator, model: nn.Module, device: torch.device
) -> Task:
    """Build the task on the device, without optimizers yet.

    Raises:
        UserError: The task, a loss term or a metric is of the wrong type.
    """
    nodes_of_stages = ((stage, getattr(config.metric, stage)) for stage in STAGES)
    metrics = {stage: make_metrics(stage, nodes, instantiator) for stage, nodes in nodes_of_stages}
    task = instantiator(
        "task",
        config.task,
        model=model,
        loss=make_loss(config, instantiator),
        metrics=metrics,
        precision=Precision.choose(config.trainer.precision, device),
    )
    if not isinstance(task, Task):
        raise UserError(
            f"task._target_={config.task['_target_']!r} is not an app.training.task.Task"
        )
    task.to(device)
    return task


def make_loss(config: Config, instantiator: Instantiator) -> WeightedSum:
    """Build the loss as a weighted sum of its terms.

    Raises:
        UserError: A node does not build a `Term`, or its function is not callable.
    """
    terms = instantiator.build_all("loss", config.loss)
    for name, term in terms.items():
        if not isinstance(term, Term):
            raise UserError(f"loss.{name}._target_ must be app.losses.weighted_sum.Term")
        if not callable(term.function):
            raise UserError(f"loss.{name}.function={term.function!r} is not a function or module")
    return WeightedSum(terms)


def make_metrics(stage: str, nodes: Mapping[str, Any], instantiator: Instantiator) -> StageMetrics:
    """Build the metrics of a stage.

    Raises:
        UserError: A metric is neither a `torchmetrics.Metric` nor a function.
    """
    metrics = instantiator.build_all(f"metric.{stage}", dict(nodes))
    for name, metric in metrics.items():
        function = metric.metric if isinstance(metric, OutputMetric) else metric
        if not isinstance(function, Metric) and not callable(function):
            raise UserError(
                f"metric.{stage}.{name} is neither a torchmetrics.Metric nor a function"
            )
    return StageMetrics(metrics, stage)


def make_callbacks(
    job: Job, instantiator: Instantiator, folder: Path, components: Components
) -> list[Callback]:
    """Build the callbacks of the configuration.

    Raises:
        UserError: A target does not build a `Callback`.
    """
    offers = {
        "folder": folder,
        "model": components.task.model,
        "config": job.plain,
        "paths": components.paths,
        "summarize": partial(make_summary, job.config, instantiator, components),
    }
    callbacks = instantiator.build_all("callbacks", job.config.callbacks, **offers)
    for name, callback in callbacks.items():
        if not isinstance(callback, Callback):
            raise UserError(f"callbacks.{name} is not an app.training.events.Callback")
    return list(callbacks.values())


def make_summary(config: Config, instantiator: Instantiator, components: Components) -> Summary:
    """Measure the model, and the memory of the optimizers that would train it."""
    trained = trained_parameters(components)
    states = []
    for key in optimizer_nodes(config.optimizer):
        for part in _optimizer_parts(config, components, key, _parameters_of(key, trained)):
            parameters = [parameter for group in part.groups for parameter in group["params"]]
            build = partial(instantiator, part.key, _without_implementation(part.node))
            states.append(optimizer_state_bytes(build, parameters))
    known = [size for size in states if size is not None]
    total = sum(known) if len(known) == len(states) else None
    return summarize_model(components.task, components.loaders["train"], trained, total)


def trained_parameters(components: Components) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained in some epoch, by name."""
    return {
        name: parameter
        for name, parameter in components.task.parameters().items()
        if parameter.requires_grad and not components.freezing.is_always_frozen(name)
    }


def _parameters_of(key: str, trained: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return what the optimizer at a key of the configuration trains, by name."""
    part = _part_of(key)
    return {n: p for n, p in trained.items() if part == SINGLE or n.startswith(f"{part}.")}


def _part_of(key: str) -> str:
    """Return the part of the model that the optimizer at a key trains."""
    return key.partition(".")[2] or SINGLE


def make_strategy(config: Config, components: Components) -> SingleDevice:
    """Choose how several ranks train together.

    Raises:
        UserError: The loss or the task does not work on several devices with this strategy.
    """
    task, trainer = components.task, config.trainer
    if not is_distributed():
        return SingleDevice(task.model)
    for module in task.loss.modules() if isinstance(task, SupervisedTask) else ():
        if getattr(module, "reduction", "mean") == "sum":
            raise UserError(
                f"loss: {type(module).__name__} with reduction='sum' depends on the number of "
                "devices; allowed on several devices: mean"
            )
    has_single_optimizer = len(optimizer_nodes(config.optimizer)) == 1
    if trainer.strategy == "fsdp":
        if not (isinstance(task, SupervisedTask) and has_single_optimizer):
            raise UserError(
                "trainer.strategy='fsdp' needs a single optimizer and a task that calls the "
                "model itself rather than parts of it, as app.training.supervised.SupervisedTask "
                "does; allowed here: ddp"
            )
        return FSDPStrategy(task.model)
    return DDPStrategy(
        task.model, components.device, has_single_optimizer, trainer.find_unused_parameters
    )


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
    groups = {key: _parameters_of(key, trainable) for key in nodes}
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


def _optimizer_parts(
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
    for part in _optimizer_parts(config, components, key, parameters):
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
            instantiator(part.key, _without_implementation(part.node), [stand_in]).step()
        except RuntimeError as error:
            kind = "sparse" if is_sparse else "dense"
            raise UserError(
                f"{part.key}: {part.node[TARGET]} cannot train {name!r}, whose gradients are "
                f"{kind}: {error}"
            ) from error


def _without_implementation(node: Node) -> Node:
    """Return the node of an optimizer without what depends on the device."""
    return {name: value for name, value in node.items() if name not in IMPLEMENTATION_OPTIONS}


def _fused_option(config: Config, node: Node, components: Components) -> dict[str, bool]:
    """Select the fused kernel on CUDA, which can skip a step without synchronizing the device."""
    user_choice = {"fused", "foreach", "differentiable", "capturable"} & node.keys()
    has_fused = node["_target_"] in {f"torch.optim.{name}" for name in FUSED_OPTIMIZERS}
    has_sparse = any(getattr(m, "sparse", False) for m in components.task.model.modules())
    on_cuda = components.device.type == "cuda" and config.trainer.strategy != "fsdp"
    return {"fused": True} if on_cuda and has_fused and not (user_choice or has_sparse) else {}


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


def make_averaging(config: Config, instantiator: Instantiator, model: nn.Module) -> WeightAveraging:
    """Build the weight averaging; without one in the configuration, the weights themselves.

    Raises:
        UserError: The target does not build a `WeightAveraging`.
    """
    if config.average is None:
        return WeightAveraging(model)
    averaging = instantiator("average", config.average, model=model)
    if not isinstance(averaging, WeightAveraging):
        raise UserError("average is not an app.training.optim.weight_averaging.WeightAveraging")
    return averaging


def make_limits(config: Config) -> TrainingLimits:
    """Collect how long to train, and when to validate and save."""
    trainer = config.trainer
    return TrainingLimits(
        max_epochs=1 if trainer.fast_dev_run else trainer.max_epochs,
        max_steps=trainer.max_steps,
        valid_every_n_epochs=trainer.valid_every_n_epochs,
        valid_every_n_steps=trainer.valid_every_n_steps,
        save_schedule=_make_save_schedule(config.checkpoint),
        sanity_valid_batches=trainer.sanity_valid_batches,
        max_seconds=parse_duration(trainer.max_time),
        log_every_n_steps=trainer.log_every_n_steps,
        min_epochs=trainer.min_epochs,
    )


def _make_save_schedule(checkpoint: CheckpointConfig) -> SaveSchedule:
    return SaveSchedule(
        every_n_epochs=checkpoint.every_n_epochs,
        every_n_steps=checkpoint.every_n_steps,
        every_n_minutes=checkpoint.every_n_minutes,
        keep_last=checkpoint.keep_last,
        save_top_k=checkpoint.save_top_k,
        in_background=checkpoint.asynchronous,
    )
