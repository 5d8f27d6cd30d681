"""The batches of each stage, from the node that says where samples come from."""

from __future__ import annotations

import torch
from torch.utils.data import TensorDataset

from app.config.build import Build
from app.config.schema import Config, Data, Trainer
from app.data.loaders import Batches, Order, SampleLoader, TensorLoader
from app.data.split import Samples, check_datasets, size, split, subset
from app.data.transform import BatchTransform, channel_statistics

STAGES = ("train", "valid", "test")
Limit = int | float | None


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
