"""Datasets and loaders of each stage, built from the configuration."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from app.config.instantiate import Instantiator
from app.config.schema import AUTO, STAGES, Config, DataConfig, LoaderConfig, TrainerConfig
from app.data.augment import per_image
from app.data.batch import BatchLoader, BatchPreparer, Inputs, MaskBatchPreparer, Masks
from app.data.boxes import (
    BOX_SOURCES,
    BoxTransform,
    UnlabeledImages,
    check_augmentations,
    has_boxes,
)
from app.data.image_cache import CachedSamples, FitImage, ImageCache, load_cached
from app.data.images import ImageFiles, with_needed_side
from app.data.joint import fill_masks
from app.data.loaders import DataLoaderOptions, IterableLoader, SampleLoader, TensorLoader
from app.data.masks import has_masks
from app.data.sampling import EpochSampler
from app.data.split import (
    check_datasets,
    dataset_labels,
    dataset_size,
    sample_groups,
    split_dataset,
    subset,
    warn_about_missing_classes,
)
from app.data.transform import (
    BatchTransform,
    TransformedDataset,
    channel_statistics,
    for_batches,
    resized_side,
    transform_samples,
)
from app.runtime.errors import UserError, as_user_error
from app.runtime.nested import Nested, pick

log = logging.getLogger(__name__)

Limit = int | float | None


def make_datasets(config: Config, build: Instantiator) -> dict[str, Dataset[Any]]:
    """Build a dataset for each stage of the mode, and the training data if others are split off it.

    Raises:
        UserError: Data is missing, damaged, empty, or has labels outside the classes.
    """
    data = config.data
    sources = build_sources(config, build)
    assert data.num_classes != AUTO
    assert data.class_names != AUTO
    present = {stage: dataset for stage, dataset in sources.items() if dataset is not None}
    check_datasets(present, data.num_classes, data.targets, data.class_names)
    warn_about_missing_classes(present, data.num_classes, data.targets, data.class_names)
    for layout in {getattr(dataset, "layout", None): None for dataset in present.values()}:
        if layout is not None:
            log.info("%s", layout)
    datasets = split_sources(config, sources)
    if config.mode == "predict":
        datasets["predict"] = _prediction_dataset(config, datasets)
    elif config.mode in STAGES and config.mode not in datasets:
        raise UserError(f"mode={config.mode!r} has no data: there is none in {data.path}")
    return datasets


def build_sources(config: Config, build: Instantiator) -> dict[str, Dataset[Any] | None]:
    """Build the sources that the mode needs.

    A source of the training stage may return a dict with the datasets of several stages; sources
    of their own take precedence.

    Returns:
        Datasets by stage. None stands for a stage that has no data, and needs none split off.

    Raises:
        UserError: Data is missing or damaged.
    """
    sources: dict[str, Dataset[Any] | None] = {}
    for stage in _required_sources(config):
        node = getattr(config.data.source, stage)
        built = None if node is None else build(f"data.source.{stage}", node)
        if isinstance(built, dict) and stage == "train":
            sources = built | sources
        elif isinstance(built, dict):
            sources[stage] = built.get(stage)
        elif built is not None:
            sources[stage] = built
    return sources


def split_sources(
    config: Config, sources: dict[str, Dataset[Any] | None]
) -> dict[str, Dataset[Any]]:
    """Split the stages without data of their own off the training data.

    Raises:
        UserError: The data cannot be split as the configuration asks.
    """
    data, split = config.data, config.data.split
    datasets = {stage: dataset for stage, dataset in sources.items() if dataset is not None}
    valid = None if "valid" in sources else split.valid
    test = None if "test" in sources else split.test
    folds = None if data.folds is None else (data.folds, data.fold)
    if folds and "valid" in sources:
        raise UserError(f"data.folds={data.folds}, but the data have a validation part already")
    if "train" in datasets and (valid is not None or test is not None or folds):
        labels = dataset_labels(datasets["train"], data.targets) if split.stratify else None
        if split.stratify and labels is None:
            raise UserError("data.split.stratify=True needs a class label for each sample")
        groups = sample_groups(datasets["train"], split.group_pattern)
        datasets = split_dataset(datasets, valid, test, split.seed, labels, folds, groups)
    batches = config.trainer.overfit_batches
    if batches and config.mode == "train":
        if isinstance(datasets["train"], IterableDataset):
            raise UserError(f"trainer.overfit_batches={batches} needs data that is not iterable")
        count = min(dataset_size(datasets["train"]), batches * data.batch_size)
        overfit_data = subset(datasets["train"], torch.arange(count))
        datasets |= {"train": overfit_data, "valid": overfit_data}
    return datasets


def _required_sources(config: Config) -> tuple[str, ...]:
    stages = active_stages(config)
    if config.mode == "predict":
        stages = () if config.predict.images else (config.predict.stage,)
    if not stages and config.mode != "predict":
        return ()
    needs_split = any(getattr(config.data.source, stage) is None for stage in stages)
    needs_training_data = needs_split or needs_statistics(config.data)
    return STAGES if needs_training_data or "train" in stages else stages


def needs_statistics(data: DataConfig) -> bool:
    """Return whether the inputs are normalized by statistics of the training data."""
    return data.normalize is not None and "auto" in (data.normalize.mean, data.normalize.std)


def active_stages(config: Config) -> tuple[str, ...]:
    """Return the stages that the mode iterates over; in prediction a single one, `predict`."""
    if config.mode == "export":
        return ()
    if config.mode in ("find_lr", "find_batch_size"):
        return ("train",)
    return STAGES if config.mode == "train" else (config.mode,)


def _prediction_dataset(config: Config, datasets: dict[str, Dataset[Any]]) -> Dataset[Any]:
    stage = config.predict.stage
    if config.predict.images is None and stage not in datasets:
        raise UserError(f"predict.stage={stage!r} has no data: there is none in {config.data.path}")
    if config.predict.images is None:
        return datasets[stage]
    side = None if config.data.transforms.eval else config.data.image_size
    with as_user_error("predict.images"):
        files = ImageFiles(config.predict.images, side, config.data.channels)
    source = config.data.source.train or {}
    return UnlabeledImages(files) if source.get("_target_") in BOX_SOURCES else files


def make_loaders(
    config: Config,
    build: Instantiator,
    datasets: dict[str, Dataset[Any]],
    device: torch.device,
    memory_format: torch.memory_format,
) -> dict[str, BatchLoader]:
    """Build a loader for each stage of the mode."""
    if not active_stages(config):
        return {}
    active = {stage: datasets[stage] for stage in active_stages(config) if stage in datasets}
    measured = {"train": datasets["train"]} if needs_statistics(config.data) else {}
    cached = _load_cached(config.data, measured | active)
    transform = _batch_transform(config.data, datasets, cached, device, memory_format)
    return {
        stage: _make_loader(config, build, stage, dataset, transform, device, cached.get(stage))
        for stage, dataset in active.items()
    }


def _load_cached(data: DataConfig, datasets: dict[str, Dataset[Any]]) -> dict[str, CachedSamples]:
    """Load the samples of each stage into the cache, if there is one.

    Raises:
        UserError: The size of the cache is invalid, or samples cannot be read or cached.
    """
    stages = {k: dataset for k, dataset in datasets.items() if not isinstance(dataset, ImageFiles)}
    if data.cache is None or not stages:
        return {}
    size = data.cache_size
    if size is None and data.image_size is not None:
        size = resized_side(data.image_size, data.eval_crop)
    sizes = [size, size] if isinstance(size, int) else size
    if sizes is None or len(sizes) != 2:
        raise UserError(f"data.cache_size={size}; allowed: a number of pixels, or [height, width]")
    # Evaluation stretches images that have masks, and crops all others.
    stretch = any(has_masks(dataset, data.inputs, data.targets) for dataset in stages.values())
    fit = FitImage(sizes[0], sizes[1], (data.image_size or 0) % 4, stretch)
    folder, threads = Path(data.cache_folder), torch.get_num_threads()
    return load_cached(ImageCache(data.cache, fit, folder, threads), stages)


def first_inputs(config: Config, build: Instantiator, dataset: Dataset[Any]) -> Nested:
    """Return the inputs of the first sample as the model receives them, but not normalized."""
    data = config.data
    transform = BatchTransform(None, None, data.resize, data.channels, torch.contiguous_format)
    loader = _make_loader(config, build, "predict", dataset, transform, torch.device("cpu"))
    return pick(loader.first(1), data.inputs)


def _batch_transform(
    data: DataConfig,
    datasets: dict[str, Dataset[Any]],
    cached: dict[str, CachedSamples],
    device: torch.device,
    memory_format: torch.memory_format,
) -> BatchTransform:
    mean = std = None
    if data.normalize is not None:
        means: list[float] = []
        stds: list[float] = []
        if needs_statistics(data):
            arrays, rows = _arrays(datasets["train"], cached.get("train"))
            means, stds = channel_statistics(arrays, data.inputs, rows)
        normalize = data.normalize
        is_image = len(data.input_shape) == 3
        mean = _per_channel(means if normalize.mean == "auto" else normalize.mean, is_image, device)
        std = _per_channel(stds if normalize.std == "auto" else normalize.std, is_image, device)
    return BatchTransform(mean, std, data.resize, data.channels, memory_format)


def _per_channel(values: object, is_image: bool, device: torch.device) -> torch.Tensor:
    vector = torch.tensor(values, dtype=torch.float32, device=device)
    return vector[:, None, None] if is_image else vector


def _make_loader(
    config: Config,
    build: Instantiator,
    stage: str,
    dataset: Dataset[Any],
    transform: BatchTransform,
    device: torch.device,
    cached: CachedSamples | None = None,
) -> BatchLoader:
    data, is_training = config.data, stage == "train" and not config.trainer.overfit_batches
    group = "train" if is_training else "eval"
    nodes = getattr(data.transforms, group)
    transforms = list(build.build_all(f"data.transforms.{group}", nodes).values())
    named = build.build_all("data.augment", data.augment if is_training else {})
    if has_boxes(dataset):
        check_augmentations(named)
    augment, masks = list(named.values()), _masks(data, dataset)
    if masks is not None:
        for step in (*transforms, *augment):
            fill_masks(step, masks.outside)
    if cached is not None or isinstance(dataset, TensorDataset):
        transform = replace(transform, transforms=[for_batches(t) for t in transforms])
    transform = replace(transform, augment=[per_image(step) for step in augment])
    batch_size = (None if stage == "train" else data.eval_batch_size) or data.batch_size
    prepare = _make_preparer(device, transform, data.inputs, masks)
    limit, options = _batch_limit(config.trainer, stage), _loader_options(data.loader)
    if isinstance(dataset, IterableDataset):
        if isinstance(limit, float):
            raise UserError(
                f"trainer.limit_{stage}_batches={limit}: a fraction of an iterable dataset is "
                "unknown; set a number of batches"
            )
        if is_training and data.sampling:
            raise UserError("data.sampling needs data that is not iterable")
        drop_last = is_training and data.drop_last
        stream = transform_samples(dataset, transforms, data.inputs, masks)
        assert isinstance(stream, IterableDataset)
        return IterableLoader(stream, batch_size, prepare, limit, config.seed, options, drop_last)
    seed = config.seed if is_training else None
    weights = _sample_weights(build, data, dataset) if is_training and data.sampling else None
    sampler = EpochSampler.from_limit(dataset_size(dataset), batch_size, limit, seed, weights)
    if is_training and data.drop_last:
        sampler = sampler.drop_last(batch_size)
    arrays, rows = _arrays(dataset, cached)
    if isinstance(arrays, TensorDataset):
        on_device = _fits_on_device(arrays, dataset_size(dataset), device, data.memory)
        return TensorLoader(arrays, sampler, batch_size, prepare, on_device, rows)
    if transforms and masks is None:
        dataset = with_needed_side(dataset, getattr(transforms[0], "needed_side", None))
    samples: Dataset[Any]
    if has_boxes(dataset):
        transform_boxes = BoxTransform(transforms, data.inputs, data.targets, stage == "train")
        samples = TransformedDataset(dataset, transform_boxes)
    else:
        samples = transform_samples(dataset, transforms, data.inputs, masks)
    return SampleLoader(samples, sampler, batch_size, prepare, config.seed, options)


def _arrays(
    dataset: Dataset[Any], cached: CachedSamples | None
) -> tuple[Dataset[Any], torch.Tensor | None]:
    """Return a dataset or the arrays that it is cached in, and the row of each sample in them."""
    return (dataset, None) if cached is None else (cached.arrays, cached.rows)


def _masks(data: DataConfig, dataset: Dataset[Any]) -> Masks | None:
    """Return where the masks of a dataset are, if its targets are masks."""
    if data.num_classes is None or not has_masks(dataset, data.inputs, data.targets):
        return None
    assert isinstance(data.targets, (int, str))
    return Masks(data.targets, 0 if data.ignore_index is None else data.ignore_index)


def _make_preparer(
    device: torch.device, transform: BatchTransform, inputs: Inputs, masks: Masks | None
) -> BatchPreparer:
    if masks is None:
        return BatchPreparer(device, transform, inputs)
    both = transform.transform_both
    return MaskBatchPreparer(device, transform, inputs, masks=masks, transform_both=both)


def _batch_limit(trainer: TrainerConfig, stage: str) -> Limit:
    if stage == "predict":
        return None
    if trainer.fast_dev_run:
        return int(trainer.fast_dev_run)
    limit: Limit = getattr(trainer, f"limit_{stage}_batches", None)
    return limit


def _sample_weights(build: Instantiator, data: DataConfig, dataset: Dataset[Any]) -> torch.Tensor:
    """Return the sampling weight of each training sample.

    Raises:
        UserError: The labels are not available without reading the samples.
    """
    labels = dataset_labels(dataset, data.targets)
    if labels is None:
        raise UserError("data.sampling needs labels: a dataset with `targets`, or one in memory")
    try:
        weights: torch.Tensor = build("data.sampling", data.sampling)(labels)
    except ValueError as error:
        raise UserError(f"data.sampling: {error}") from error
    return weights


def _fits_on_device(
    arrays: TensorDataset, num_samples: int, device: torch.device, memory: str
) -> bool:
    if memory != "auto" or device.type != "cuda":
        return memory != "host"
    free, _ = torch.cuda.mem_get_info(device)
    return num_samples * sum(t[0].numel() * t.element_size() for t in arrays.tensors) < free / 4


def _loader_options(loader: LoaderConfig) -> DataLoaderOptions:
    """Return the options of a `DataLoader`; `auto` is a worker for each core of this rank."""
    cores = torch.get_num_threads()
    num_workers = (cores if cores > 1 else 0) if loader.num_workers == AUTO else loader.num_workers
    return DataLoaderOptions(**vars(loader) | {"num_workers": num_workers})
