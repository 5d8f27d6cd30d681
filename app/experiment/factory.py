"""Build the components of a run from its configuration: model, data, task, optimizers, callbacks.

The modules below this one take plain arguments and never see the configuration.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchmetrics import Metric

from app.config.allowlist import TARGET
from app.config.instantiate import Instantiator
from app.config.optimizers import (
    optimizer_nodes,
)
from app.config.rules import CKPT_MODES, parse_duration
from app.config.schema import AUTO, STAGES, CheckpointConfig, CompileConfig, Config, Node
from app.data.batch import BatchLoader
from app.data.datamodule import make_datasets, make_loaders
from app.data.identity import DataIdentity, identify_data
from app.data.split import sample_paths
from app.distributed.collectives import (
    broadcast_object,
    is_distributed,
    rank,
    rank_zero_first,
)
from app.distributed.strategies import DDPStrategy, FSDPStrategy, SingleDevice
from app.distributed.sync_batchnorm import convert_sync_batchnorm
from app.experiment.dry_run import dry_run
from app.experiment.optimizer_parts import (
    OptimizerPart,
    make_optimizer_parts,
    trained_parameters,
)
from app.experiment.teacher import Teacher, read_teacher
from app.losses.weighted_sum import Term, WeightedSum
from app.metrics.output_metric import OutputMetric
from app.metrics.stage_metrics import StageMetrics
from app.runtime.errors import UserError
from app.runtime.seed import seed_everything
from app.training.checkpoint.checkpoint import load_weights
from app.training.checkpoint.initial_weights import InitialWeights, load_initial_weights
from app.training.distill import DistillTask
from app.training.gradient_checkpointing import checkpoint_blocks
from app.training.limits import SaveSchedule, TrainingLimits
from app.training.optim.freezing import FreezeSchedule
from app.training.optim.weight_averaging import WeightAveraging
from app.training.precision import Precision, memory_format
from app.training.supervised import SupervisedTask
from app.training.task import Task

log = logging.getLogger(__name__)
ZOO_MODELS = (  # their `weights` initialize the model, and change nothing else
    "app.models.smp_models.smp_model",
    "app.models.timm_models.timm_model",
    "app.models.torchvision_models.torchvision_model",
)


@dataclass(frozen=True)
class Components:
    """The objects that every mode needs.

    Attributes:
        task: The train and eval steps; holds the model, which is on the device.
        loaders: The batch loader of each stage that the mode runs and that has data.
        paths: The file of each sample of a stage, in order, where samples are files.
        freezing: When which parameters of the model are frozen.
        optimizer_parts: Which optimizer trains which parameters, by its key in the configuration;
            empty if the mode does not train.
        device: The device of the model and of the batches.
        data: Which data each stage of `loaders` has; on rank 0 only.
        initial: Where the initial weights come from; None if they are random or of a checkpoint.
        teacher: What identifies the teacher of the task; None if it has none.
    """

    task: Task
    loaders: dict[str, BatchLoader]
    paths: dict[str, list[str]]
    freezing: FreezeSchedule
    optimizer_parts: dict[str, list[OptimizerPart]]
    device: torch.device
    data: dict[str, DataIdentity]
    initial: InitialWeights | None
    teacher: dict[str, str] | None


def make_components(config: Config, instantiator: Instantiator, device: torch.device) -> Components:
    """Build the model, the data and the task, and try them on two samples of each stage.

    In modes that train, the parameters are divided among the optimizers, which are built later.

    Raises:
        UserError: A component cannot be built, or the components do not fit together.
    """
    model = make_model(config, instantiator, device)
    initial = load_init(config, model)
    layout = _memory_format(config, model)
    with rank_zero_first():
        datasets = make_datasets(config, instantiator)
    loaders = make_loaders(config, instantiator, datasets, device, layout)
    teacher = load_teacher(config)
    task = make_task(config, instantiator, model, device, teacher)
    for stage, loader in loaders.items():
        dry_run(task, stage, loader, config.data)
    freezes = {name: freeze for name, freeze in config.freeze.items() if freeze is not None}
    freezing = FreezeSchedule(model, freezes)
    trains = config.mode not in CKPT_MODES
    trained = trained_parameters(task, freezing)
    parts = make_optimizer_parts(config, instantiator, model, trained) if trains else {}
    if config.trainer.compile:
        model.compile(**_compile_arguments(config.trainer.compile))
    paths = {stage: paths for stage in loaders if (paths := sample_paths(datasets[stage]))}
    data = {stage: identify_data(datasets[stage]) for stage in loaders if rank() == 0}
    record = teacher.record if teacher else None
    return Components(task, loaders, paths, freezing, parts, device, data, initial, record)


def make_model(config: Config, instantiator: Instantiator, device: torch.device) -> nn.Module:
    """Build the model on the device; its initial weights depend only on the seed.

    Raises:
        UserError: The target does not build a `torch.nn.Module`.
    """
    seed_everything(config.seed, "model")
    has_checkpoint = config.mode in CKPT_MODES or config.resume not in (None, AUTO)
    node = without_published_weights(config.model) if has_checkpoint else config.model
    model = instantiator("model", node)
    if not isinstance(model, nn.Module):
        raise UserError(f"model: {config.model['_target_']} is not a torch.nn.Module")
    if config.mode == "train" and config.trainer.sync_batchnorm and is_distributed():
        model = convert_sync_batchnorm(model, device)
    if config.mode not in CKPT_MODES:
        blocks = checkpoint_blocks(model, config.trainer.gradient_checkpointing)
        if blocks:
            log.info("gradient checkpointing of %s", ", ".join(blocks))
    return _move(config, model, device)


def without_published_weights(node: Node) -> Node:
    """Return the node of a model that gets all of its weights from a checkpoint.

    A model of a zoo would read, or download, its published weights to replace them.
    """
    return node | {"weights": None} if node.get(TARGET) in ZOO_MODELS else node


def _move(config: Config, model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to the device, in the precision and the memory format of the run."""
    Precision.choose(config.trainer.precision, device).convert(model)
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


def load_teacher(config: Config) -> Teacher | None:
    """Read the teacher of a training on rank 0; all ranks must call this.

    Raises:
        UserError: It cannot be read.
    """
    if config.teacher is None or config.mode in CKPT_MODES:
        return None
    return broadcast_object(read_teacher(Path(config.teacher)) if rank() == 0 else None)


def make_task(
    config: Config,
    instantiator: Instantiator,
    model: nn.Module,
    device: torch.device,
    teacher: Teacher | None = None,
) -> Task:
    """Build the task on the device, without optimizers yet.

    Raises:
        UserError: The task, a loss term or a metric is of the wrong type.
    """
    nodes_of_stages = ((stage, getattr(config.metric, stage)) for stage in STAGES)
    metrics = {stage: make_metrics(stage, nodes, instantiator) for stage, nodes in nodes_of_stages}
    taught = {"teacher": make_teacher(config, instantiator, teacher, device)} if teacher else {}
    task = instantiator(
        "task",
        config.task,
        model=model,
        loss=make_loss(config, instantiator),
        metrics=metrics,
        precision=Precision.choose(config.trainer.precision, device),
        **taught,
    )
    if not isinstance(task, Task):
        raise UserError(
            f"task._target_={config.task['_target_']!r} is not an app.training.task.Task"
        )
    if teacher and not isinstance(task, DistillTask):
        raise UserError(
            f"teacher={config.teacher!r} is not used by {config.task['_target_']}; allowed: "
            "task=distill, or a task derived from app.training.distill.DistillTask"
        )
    task.to(device)
    return task


def make_teacher(
    config: Config, instantiator: Instantiator, teacher: Teacher, device: torch.device
) -> nn.Module:
    """Build the model of a teacher on the device, with its weights.

    Raises:
        UserError: It cannot be built, or the weights do not fit it.
    """
    model = instantiator("teacher: model", without_published_weights(teacher.model))
    if not isinstance(model, nn.Module):
        raise UserError(f"teacher: the model of {teacher.file} is not a torch.nn.Module")
    load_weights(model, teacher.weights, f"teacher={str(teacher.file)!r}")
    return _move(config, model, device)


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
