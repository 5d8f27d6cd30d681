"""A dataset for each stage, cut where need be, and looked over."""

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


def split(
    datasets: dict[str, Dataset[Any]],
    valid: int | float | None,
    test: int | float | None,
    seed: int,
) -> dict[str, Dataset[Any]]:
    """Cuts validation and test data from the training data.

    Args:
        datasets: By stage.
        valid: A number of samples, a share of the training data, or None.
        test: Likewise.
        seed: Which samples are cut depends on it alone.

    Raises:
        UserError: There are not so many samples.
    """
    if valid is None and test is None:
        return datasets
    if isinstance(datasets["train"], IterableDataset):
        raise UserError(
            f"data.split.valid={valid!r} and data.split.test={test!r}: nothing can be cut from an "
            "iterable dataset; give data.source.valid and data.source.test"
        )
    total = size(datasets["train"])
    parts = {"valid": _count(valid, total), "test": _count(test, total)}
    rest = total - sum(parts.values())
    if rest < 1:
        raise UserError(
            f"data.split.valid={valid!r} and data.split.test={test!r} leave nothing of "
            f"{total} training samples"
        )
    order = torch.randperm(
        total, generator=torch.Generator().manual_seed(derive_seed(seed, "split"))
    )
    chosen = dict(zip(("train", *parts), order.split([rest, *parts.values()]), strict=True))
    cut = {stage: subset(datasets["train"], i) for stage, i in chosen.items() if len(i)}
    return datasets | cut


def _count(part: int | float | None, total: int) -> int:
    if part is None:
        return 0
    return part if isinstance(part, int) else max(1, round(part * total))


def size(dataset: Dataset[Any]) -> int:
    """Its number of samples."""
    return len(dataset)  # type: ignore[arg-type]


def subset(dataset: Dataset[Any], indices: Tensor) -> Dataset[Any]:
    """Those samples; tensors stay tensors, so that they can still be indexed by batch."""
    if isinstance(dataset, TensorDataset):
        return TensorDataset(*(tensor[indices] for tensor in dataset.tensors))
    return Subset(dataset, indices.tolist())


def check_datasets(
    datasets: dict[str, Dataset[Any]], num_classes: int | None, targets: Key
) -> None:
    """Refuses empty data and labels outside the classes; warns of classes without a sample.

    Args:
        datasets: By stage; iterable ones cannot be looked over.
        num_classes: None where targets are no classes.
        targets: Which part of a sample is its target.

    Raises:
        UserError: Names the stage and the label.
    """
    for stage, dataset in datasets.items():
        if isinstance(dataset, IterableDataset):
            continue
        if size(dataset) == 0:
            raise UserError(f"data.source.{stage} has no samples")
        names = getattr(dataset, "classes", None)
        if num_classes is not None and names is not None and len(names) != num_classes:
            raise UserError(
                f"data.num_classes={num_classes}, but data.source.{stage} has {len(names)} "
                f"classes: {_listed(names)}"
            )
        labels = labels_of(dataset, targets)
        if num_classes is not None and labels is not None:
            _check_labels(stage, labels, num_classes)


def _listed(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(map(str, names[:most])) + (", ..." if len(names) > most else "")


def labels_of(dataset: Dataset[Any], targets: Key) -> Tensor | None:
    """The labels of all samples, where they can be had without reading the samples."""
    if isinstance(dataset, Subset):
        labels = labels_of(dataset.dataset, targets)
        return None if labels is None else labels[torch.as_tensor(dataset.indices)]
    found = getattr(dataset, "targets", None)
    if isinstance(dataset, TensorDataset):
        known = isinstance(targets, int) and targets < len(dataset.tensors)
        found = dataset.tensors[targets] if known else None  # type: ignore[index]
    labels = None if found is None else torch.as_tensor(found)
    return labels if labels is not None and labels.ndim == 1 else None


def _check_labels(stage: str, labels: Tensor, num_classes: int) -> None:
    if labels.is_floating_point():
        raise UserError(
            f"data.num_classes={num_classes}, but the targets of data.source.{stage} are of type "
            f"{labels.dtype}; class labels are whole numbers"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        raise UserError(
            f"data.num_classes={num_classes}, but data.source.{stage} has the label {wrong}; "
            f"allowed: 0 to {num_classes - 1}"
        )
    empty = (torch.bincount(labels, minlength=num_classes) == 0).nonzero().flatten().tolist()
    if empty:
        log.warning("no sample of class %s in the %s data", ", ".join(map(str, empty)), stage)
