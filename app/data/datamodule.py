"""The batches of each stage, from the node that says where samples come from."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from app.config.instantiate import Instantiator
from app.config.schema import Config, DataConfig, TrainerConfig
from app.data.batch import BatchLoader, BatchPreparer
from app.data.images import ImageFiles
from app.data.loaders import DataLoaderOptions, IterableLoader, SampleLoader, TensorLoader
from app.data.sampling import EpochSampler
from app.data.split import check_datasets, labels_of, size, split, subset
from app.data.transform import BatchTransform, channel_statistics
from app.runtime.errors import UserError, as_user_error

STAGES = ("train", "valid", "test")
Limit = int | float | None


def make_datasets(config: Config, build: Instantiator) -> dict[str, Dataset[Any]]:
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
    check_datasets(datasets, data.num_classes, data.targets)
    if "train" in datasets:
        datasets = split(datasets, data.split.valid, data.split.test, data.split.seed)
    batches = config.trainer.overfit_batches
    if batches and config.mode == "train":
        if isinstance(datasets["train"], IterableDataset):
            raise UserError(f"trainer.overfit_batches={batches} needs data that is not iterable")
        count = min(size(datasets["train"]), batches * data.batch_size)
        few = subset(datasets["train"], torch.arange(count))
        datasets |= {"train": few, "valid": few}
    if config.mode == "predict":
        datasets["predict"] = _predicted(config, datasets)
    return datasets


def _predicted(config: Config, datasets: dict[str, Dataset[Any]]) -> Dataset[Any]:
    if config.predict.images is None:
        return datasets[config.predict.stage]
    with as_user_error("predict.images"):
        return ImageFiles(config.predict.images, config.data.image_size, config.data.channels)


def _sources_wanted(config: Config) -> tuple[str, ...]:
    wanted = stages_run(config)
    if config.mode == "predict":
        wanted = () if config.predict.images else (config.predict.stage,)
    if not wanted and config.mode != "predict":
        return ()
    wanted_values = config.data.normalize
    measured = wanted_values is not None and "auto" in (wanted_values.mean, wanted_values.std)
    cut = any(getattr(config.data.source, stage) is None for stage in wanted)
    return STAGES if measured or cut or "train" in wanted else wanted


def make_loaders(
    config: Config,
    build: Instantiator,
    datasets: dict[str, Dataset[Any]],
    device: torch.device,
    format_: torch.memory_format,
) -> dict[str, BatchLoader]:
    """The batches of each stage."""
    if not stages_run(config):
        return {}
    plain = _transform(config.data, datasets, device, format_)
    return {
        stage: _loader(config, build, stage, datasets[stage], plain, device)
        for stage in stages_run(config)
        if stage in datasets
    }


def stages_run(config: Config) -> tuple[str, ...]:
    """The stages whose batches are gone through; in prediction a single one, `predict`."""
    if config.mode == "export":
        return ()
    if config.mode in ("find_lr", "find_batch_size"):
        return ("train",)
    return STAGES if config.mode == "train" else (config.mode,)


def _transform(
    data: DataConfig,
    datasets: dict[str, Dataset[Any]],
    device: torch.device,
    format_: torch.memory_format,
) -> BatchTransform:
    mean = std = None
    if data.normalize is not None:
        measured = "auto" in (data.normalize.mean, data.normalize.std)
        means, stds = channel_statistics(datasets["train"], data.inputs) if measured else ([], [])
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
    build: Instantiator,
    stage: str,
    dataset: Dataset[Any],
    transform: BatchTransform,
    device: torch.device,
) -> BatchLoader:
    data, learns = config.data, stage == "train" and not config.trainer.overfit_batches
    if learns:
        augment = list(build.named("data.augment", data.augment).values())
        transform = BatchTransform(**{**vars(transform), "augment": augment})
    batch_size = (None if stage == "train" else data.eval_batch_size) or data.batch_size
    ready = BatchPreparer(device, transform, data.inputs)
    limit, reading = _limit(config.trainer, stage), DataLoaderOptions(**vars(data.loader))
    if isinstance(dataset, IterableDataset):
        if isinstance(limit, float):
            raise UserError(
                f"trainer.limit_{stage}_batches={limit}: a share of an iterable dataset is not "
                "known; give a number of batches"
            )
        if learns and data.sampling:
            raise UserError("data.sampling needs data that is not iterable")
        whole = learns and data.drop_last
        return IterableLoader(dataset, batch_size, ready, limit, config.seed, reading, whole)
    seed = config.seed if learns else None
    weights = _weights(build, data, dataset) if learns and data.sampling else None
    order = EpochSampler.limited(size(dataset), batch_size, limit, seed, weights)
    if learns and data.drop_last:
        order = order.of_whole_batches(batch_size)
    if isinstance(dataset, TensorDataset):
        on_device = _fits_on_device(dataset, device, data.memory)
        return TensorLoader(dataset, order, batch_size, ready, on_device)
    loader = SampleLoader(dataset, order, batch_size, ready, config.seed, reading)
    loader.names = getattr(dataset, "names", None)
    return loader


def _weights(build: Instantiator, data: DataConfig, dataset: Dataset[Any]) -> torch.Tensor:
    """How likely each sample of the training data is.

    Raises:
        UserError: It has no labels that can be had without reading the samples.
    """
    labels = labels_of(dataset, data.targets)
    if labels is None:
        raise UserError("data.sampling needs labels: a dataset with `targets`, or one in memory")
    try:
        weights: torch.Tensor = build("data.sampling", data.sampling)(labels)
    except ValueError as error:
        raise UserError(f"data.sampling: {error}") from error
    return weights


def _limit(trainer: TrainerConfig, stage: str) -> Limit:
    if stage == "predict":
        return None
    if trainer.fast_dev_run:
        return int(trainer.fast_dev_run)
    limit: Limit = getattr(trainer, f"limit_{stage}_batches", None)
    return limit


def _fits_on_device(dataset: TensorDataset, device: torch.device, memory: str) -> bool:
    if memory != "auto" or device.type != "cuda":
        return memory != "host"
    free, _ = torch.cuda.mem_get_info(device)
    return sum(t.numel() * t.element_size() for t in dataset.tensors) < free / 4
