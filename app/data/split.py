"""Splitting of the training data into stages, and checks of the datasets of all stages."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from app.runtime.errors import UserError
from app.runtime.nested import Key
from app.runtime.seed import derive_seed

log = logging.getLogger(__name__)


def split_dataset(
    datasets: dict[str, Dataset[Any]],
    valid: int | float | None,
    test: int | float | None,
    seed: int,
) -> dict[str, Dataset[Any]]:
    """Split validation and test data off the training data.

    Args:
        datasets: Datasets by stage.
        valid: Number of samples (int), fraction of the training data (float), or None.
        test: Same as `valid`, for test data.
        seed: The choice of samples depends only on the seed.

    Raises:
        UserError: No training sample would be left, or the training data is iterable.
    """
    if valid is None and test is None:
        return datasets
    if isinstance(datasets["train"], IterableDataset):
        raise UserError(
            f"data.split.valid={valid!r} and data.split.test={test!r}: an iterable dataset cannot "
            "be split; set data.source.valid and data.source.test"
        )
    total = dataset_size(datasets["train"])
    sizes = {"valid": _split_size(valid, total), "test": _split_size(test, total)}
    rest = total - sum(sizes.values())
    if rest < 1:
        raise UserError(
            f"data.split.valid={valid!r} and data.split.test={test!r} leave none of the "
            f"{total} training samples"
        )
    order = torch.randperm(
        total, generator=torch.Generator().manual_seed(derive_seed(seed, "split"))
    )
    indices = dict(zip(("train", *sizes), order.split([rest, *sizes.values()]), strict=True))
    subsets = {stage: subset(datasets["train"], i) for stage, i in indices.items() if len(i)}
    return datasets | subsets


def _split_size(part: int | float | None, total: int) -> int:
    if part is None:
        return 0
    return part if isinstance(part, int) else max(1, round(part * total))


def subset(dataset: Dataset[Any], indices: Tensor) -> Dataset[Any]:
    """Return the given samples; a `TensorDataset` remains one, so that batches can be indexed."""
    if isinstance(dataset, TensorDataset):
        return TensorDataset(*(tensor[indices] for tensor in dataset.tensors))
    return Subset(dataset, indices.tolist())


def check_datasets(
    datasets: dict[str, Dataset[Any]], num_classes: int | None, targets: Key
) -> None:
    """Refuse empty data and labels outside the classes; warn about classes without samples.

    Args:
        datasets: Datasets by stage; iterable ones are skipped.
        num_classes: None if targets are not classes.
        targets: Key of the target within a sample.

    Raises:
        UserError: A dataset is empty, has an invalid label, or another number of classes.
    """
    for stage, dataset in datasets.items():
        if isinstance(dataset, IterableDataset):
            continue
        if dataset_size(dataset) == 0:
            raise UserError(f"data.source.{stage} has no samples")
        names = getattr(dataset, "classes", None)
        if num_classes is not None and names is not None and len(names) != num_classes:
            raise UserError(
                f"data.num_classes={num_classes}, but data.source.{stage} has {len(names)} "
                f"classes: {_join_names(names)}"
            )
        labels = dataset_labels(dataset, targets)
        if num_classes is not None and labels is not None:
            _check_labels(stage, labels, num_classes)


def _join_names(names: Sequence[str], max_names: int = 8) -> str:
    return ", ".join(map(str, names[:max_names])) + (", ..." if len(names) > max_names else "")


def _check_labels(stage: str, labels: Tensor, num_classes: int) -> None:
    if labels.is_floating_point():
        raise UserError(
            f"data.num_classes={num_classes}, but the targets of data.source.{stage} have dtype "
            f"{labels.dtype}; class labels must be integers"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        invalid = low if low < 0 else high
        raise UserError(
            f"data.num_classes={num_classes}, but data.source.{stage} has the label {invalid}; "
            f"allowed: 0 to {num_classes - 1}"
        )
    empty = (torch.bincount(labels, minlength=num_classes) == 0).nonzero().flatten().tolist()
    if empty:
        log.warning("no sample of class %s in the %s data", ", ".join(map(str, empty)), stage)


def dataset_size(dataset: Dataset[Any]) -> int:
    """Return the number of samples of a map-style dataset."""
    return len(dataset)  # type: ignore[arg-type]


def dataset_labels(dataset: Dataset[Any], targets: Key) -> Tensor | None:
    """Return the labels of all samples, shape (N,), or None if samples would have to be read.

    Args:
        dataset: Labels are taken from its attribute `targets`, or from the tensors of a
            `TensorDataset`.
        targets: Key of the target within a sample.
    """
    if isinstance(dataset, Subset):
        labels = dataset_labels(dataset.dataset, targets)
        return None if labels is None else labels[torch.as_tensor(dataset.indices)]
    values = getattr(dataset, "targets", None)
    if isinstance(dataset, TensorDataset):
        has_targets = isinstance(targets, int) and targets < len(dataset.tensors)
        values = dataset.tensors[targets] if has_targets else None  # type: ignore[index]
    labels = None if values is None else torch.as_tensor(values)
    return labels if labels is not None and labels.ndim == 1 else None


def sample_paths(dataset: Dataset[Any]) -> list[str] | None:
    """Return the file of each sample, from the attribute `paths` of the dataset, if it has it."""
    if isinstance(dataset, Subset):
        paths = sample_paths(dataset.dataset)
        return None if paths is None else [paths[index] for index in dataset.indices]
    return getattr(dataset, "paths", None)
