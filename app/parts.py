"""The parts that a configuration names, put together; below here nobody knows of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset
from torchmetrics import Metric

from app.callbacks.callback import Callback
from app.config.build import Build
from app.config.check import fill_auto
from app.config.errors import UserError
from app.config.schema import Config, Data, Trainer
from app.data.loaders import Batches, Order, SampleLoader, TensorLoader
from app.data.split import Samples, check_datasets, size, split, subset
from app.data.transform import BatchTransform, channel_statistics
from app.device import Precision, memory_format
from app.losses.term import Term, WeightedSum
from app.metrics.measure import StageMetrics
from app.optimization import Optimization
from app.schedule import Schedule
from app.seed import seed_everything
from app.task import SupervisedTask
from app.trainer import Plan

STAGES = ("train", "valid", "test")
Limit = int | float | None


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


def make_datasets(config: Config, build: Build) -> dict[str, Samples]:
    """A dataset for each stage that the mode runs, and for training where others are cut from it.

    Raises:
        UserError: Data is missing, damaged, empty, or has labels outside the classes.
    """
    data = config.data
    datasets = {
        stage: build(f"data.source.{stage}", node)
        for stage in _sources_wanted(config)
        if (node := getattr(data.source, stage)) is not None
    }
    check_datasets(datasets, data.num_classes)
    if "train" in datasets:
        datasets = split(datasets, data.split.valid, data.split.test, data.split.seed)
    batches = config.trainer.overfit_batches
    if batches and config.mode == "train":
        count = min(size(datasets["train"]), batches * data.batch_size)
        few = subset(datasets["train"], torch.arange(count))
        datasets |= {"train": few, "valid": few}
    return datasets


def _sources_wanted(config: Config) -> tuple[str, ...]:
    measured = config.data.normalize is not None and config.data.normalize.mean == "auto"
    cut = config.mode != "train" and getattr(config.data.source, config.mode) is None
    return STAGES if config.mode == "train" or measured or cut else (config.mode,)


def make_loaders(
    config: Config,
    build: Build,
    datasets: dict[str, Samples],
    device: torch.device,
    format_: torch.memory_format,
) -> dict[str, Batches]:
    """The batches of each stage."""
    plain = _transform(config.data, datasets, device, format_)
    wanted = STAGES if config.mode == "train" else (config.mode,)
    return {
        stage: _loader(config, build, stage, datasets[stage], plain, device)
        for stage in wanted
        if stage in datasets
    }


def _transform(
    data: Data, datasets: dict[str, Samples], device: torch.device, format_: torch.memory_format
) -> BatchTransform:
    mean = std = None
    if data.normalize is not None:
        measured = "auto" in (data.normalize.mean, data.normalize.std)
        means, stds = channel_statistics(datasets["train"]) if measured else ([], [])
        wanted = data.normalize
        image = len(data.input_shape) == 3
        mean = _per_channel(means if wanted.mean == "auto" else wanted.mean, image, device)
        std = _per_channel(stds if wanted.std == "auto" else wanted.std, image, device)
    return BatchTransform(mean, std, data.resize, data.channels, format_)


def _per_channel(values: object, image: bool, device: torch.device) -> torch.Tensor:
    vector = torch.tensor(values, dtype=torch.float32, device=device)
    return vector[:, None, None] if image else vector


def _loader(
    config: Config,
    build: Build,
    stage: str,
    dataset: Samples,
    transform: BatchTransform,
    device: torch.device,
) -> Batches:
    data, learns = config.data, stage == "train" and not config.trainer.overfit_batches
    if learns:
        augment = list(build.named("data.augment", data.augment).values())
        transform = BatchTransform(**{**vars(transform), "augment": augment})
    order = Order.limited(
        size(dataset),
        data.batch_size,
        _limit(config.trainer, stage),
        config.seed if learns else None,
    )
    if isinstance(dataset, TensorDataset):
        on_device = _fits_on_device(dataset, device, data.memory)
        return TensorLoader(dataset, order, data.batch_size, transform, device, on_device)
    reading = vars(data.loader)
    return SampleLoader(dataset, order, data.batch_size, transform, device, config.seed, **reading)


def _limit(trainer: Trainer, stage: str) -> Limit:
    if trainer.fast_dev_run:
        return int(trainer.fast_dev_run)
    limit: Limit = getattr(trainer, f"limit_{stage}_batches")
    return limit


def _fits_on_device(dataset: TensorDataset, device: torch.device, memory: str) -> bool:
    if memory != "auto" or device.type != "cuda":
        return memory != "host"
    free, _ = torch.cuda.mem_get_info(device)
    return sum(t.numel() * t.element_size() for t in dataset.tensors) < free / 4


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
