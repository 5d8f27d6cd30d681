"""What a run must know about its data before it starts: counts, names, shapes, damaged files."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from app.config.instantiate import Instantiator
from app.config.schema import AUTO, Config
from app.data.boxes import has_boxes
from app.data.coco import check_boxes
from app.data.datamodule import build_sources, first_inputs, needs_statistics, split_sources
from app.data.image_cache import check_cacheable
from app.data.image_checks import check_images, find_duplicates
from app.data.masks import check_mask_labels, count_mask_classes, pixel_counts
from app.data.split import (
    check_datasets,
    class_weights,
    dataset_labels,
    sample_files,
    weights_from_counts,
)
from app.data.transform import check_in_memory
from app.runtime.errors import UserError
from app.runtime.nested import pick


@dataclass(frozen=True)
class DataReport:
    """What was found in the data.

    Attributes:
        facts: Values for the keys of `data` that are `auto`.
        warnings: What is suspicious, one line each.
    """

    facts: dict[str, Any]
    warnings: list[str] = field(default_factory=list)


def inspect_data(config: Config, build: Instantiator) -> DataReport:
    """Read the data that the mode needs, and check it; no file of a run is written.

    Raises:
        UserError: Data is missing, damaged or empty, has labels outside the classes, or cannot
            tell the value of a key that is `auto`.
    """
    if config.mode == "check":
        config = replace(config, mode="train")
    data = config.data
    sources = build_sources(config, build)
    datasets = {stage: dataset for stage, dataset in sources.items() if dataset is not None}
    if not datasets:
        return DataReport({})
    check_datasets(datasets, None, data.targets)
    reference = datasets["train" if "train" in datasets else next(iter(datasets))]
    facts: dict[str, Any] = {}
    if data.class_names == AUTO:
        facts["class_names"] = class_names(reference)
    if data.num_classes == AUTO:
        facts["num_classes"] = count_classes(reference, config)
    config = replace(config, data=replace(data, **facts))
    check_datasets(
        datasets,
        config.data.num_classes,  # type: ignore[arg-type]
        data.targets,
        config.data.class_names,
    )
    warnings = check_mask_labels(datasets, config.data.num_classes) + check_boxes(datasets)
    stages = split_sources(config, sources)
    if data.cache is not None:
        check_cacheable(stages)
    elif needs_statistics(data) and "train" in stages:
        check_in_memory(stages["train"])
    if data.class_weights == AUTO:
        facts["class_weights"] = _class_weights(stages, config)
    files = {stage: found for stage, dataset in stages.items() if (found := sample_files(dataset))}
    check_images([path for paths in files.values() for path in paths])
    inputs = first_inputs(config, build, reference)
    shape = list(inputs.shape[1:]) if isinstance(inputs, Tensor) else None
    if data.input_shape == AUTO:
        if shape is None:
            raise UserError(f"data.input_shape='auto' needs one input, not {data.inputs!r}")
        facts["input_shape"] = shape
    elif shape is not None and shape != data.input_shape:
        raise UserError(f"data.input_shape={data.input_shape}, but the samples have shape {shape}")
    return DataReport(facts, [*warnings, *find_duplicates(files)])


def _class_weights(stages: dict[str, Dataset[Any]], config: Config) -> list[float]:
    data = config.data
    if "train" not in stages or not isinstance(data.num_classes, int):
        raise UserError("data.class_weights='auto' needs training data with class labels")
    power, ignore_index = data.class_weight_power, data.ignore_index
    pixels = pixel_counts(stages["train"])
    if pixels is not None:
        counts = pixels.sum(0)[: data.num_classes]
        return weights_from_counts(counts, counts.sum() / data.num_classes, power)
    return class_weights(stages["train"], data.targets, data.num_classes, power, ignore_index)


def class_names(dataset: Dataset[Any]) -> list[str] | None:
    """Return the names of the classes, if the dataset has them."""
    names = getattr(dataset, "classes", None)
    return None if names is None else [str(name) for name in names]


def count_classes(dataset: Dataset[Any], config: Config) -> int | None:
    """Return the number of classes; None if the targets are not classes.

    Raises:
        UserError: The labels are not available, or do not have every number from 0 on.
    """
    if config.data.targets is None:
        return None
    names = class_names(dataset)
    labels = dataset_labels(dataset, config.data.targets)
    in_masks = count_mask_classes(dataset)
    if names is not None:
        count = len(names)
    elif in_masks is not None:
        count = in_masks
    elif labels is None:
        if _has_float_targets(dataset, config):
            return None
        raise UserError("data.num_classes='auto': the labels cannot be counted; set a number")
    elif labels.is_floating_point():
        return None
    else:
        count = _count_labels(labels)
    if count < 2 and not has_boxes(dataset):
        raise UserError(
            f"data.num_classes='auto': the training data have {count} class; allowed: 2"
        )
    return count


def _has_float_targets(dataset: Dataset[Any], config: Config) -> bool:
    if not isinstance(dataset, TensorDataset):
        return False
    target = pick(dataset.tensors, config.data.targets)
    return isinstance(target, Tensor) and target.is_floating_point()


def _count_labels(labels: Tensor) -> int:
    present = labels.unique().tolist()
    count = present[-1] + 1 if present else 0
    missing = sorted({*range(min(count, 100_000))} - {*present})
    if missing or min(present, default=0) < 0:
        shown = ", ".join(map(str, present[:20]))
        raise UserError(
            f"data.num_classes='auto': the labels of the training data are {shown}; "
            "allowed are 0, 1, ... without a gap. Set data.num_classes, or, for a table, "
            "data.class_names; to predict values, use experiment=csv_regression"
        )
    return int(count)
