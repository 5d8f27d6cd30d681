"""Splitting of the training data into stages, and checks of the datasets of all stages."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
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
    labels: Tensor | None = None,
) -> dict[str, Dataset[Any]]:
    """Split validation and test data off the training data.

    Args:
        datasets: Datasets by stage.
        valid: Number of samples (int), fraction of the training data (float), or None.
        test: Same as `valid`, for test data.
        seed: The choice of samples depends only on the seed.
        labels: Class of each training sample, shape (N,), if every part shall have each class in
            the same proportion.

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
    if labels is not None:
        order = _stratified(order, labels)
    indices = dict(zip(("train", *sizes), order.split([rest, *sizes.values()]), strict=True))
    subsets = {stage: subset(datasets["train"], i) for stage, i in indices.items() if len(i)}
    return datasets | subsets


def _stratified(order: Tensor, labels: Tensor) -> Tensor:
    """Sort samples so that every stretch has each class in the same proportion, within one sample.

    The sample in the middle of its class comes in the middle of all samples, and so on. A class of
    one or two samples comes early, and so in the training data, which is the first stretch.
    """
    position = torch.empty(len(order), dtype=torch.float64)
    for label in labels.unique():
        members = order[labels[order] == label]
        count = len(members)
        position[members] = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return order[position[order].argsort(stable=True)]


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
    datasets: dict[str, Dataset[Any]],
    num_classes: int | None,
    targets: Key,
    class_names: Sequence[str] | None = None,
) -> None:
    """Refuse empty data, labels outside the classes, and other classes than the expected ones.

    Args:
        datasets: Datasets by stage; iterable ones are skipped.
        num_classes: None if targets are not classes.
        targets: Key of the target within a sample.
        class_names: Names of the classes, in the order of their labels; None if unknown.

    Raises:
        UserError: A dataset is empty, has an invalid label, or other classes.
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
        if class_names is not None and names is not None and [*names] != [*class_names]:
            raise UserError(
                f"data.class_names={[*class_names]}, but data.source.{stage} has the classes "
                f"{[*names]}"
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


def warn_about_missing_classes(
    datasets: dict[str, Dataset[Any]],
    num_classes: int | None,
    targets: Key,
    class_names: Sequence[str] | None = None,
) -> None:
    """Log the classes of which a stage has no sample; arguments are those of `check_datasets`."""
    for stage, dataset in datasets.items():
        labels = None if isinstance(dataset, IterableDataset) else dataset_labels(dataset, targets)
        if num_classes is None or labels is None:
            continue
        counts = torch.bincount(labels, minlength=num_classes)
        names = class_names or range(num_classes)
        missing = [names[label] for label in (counts == 0).nonzero().flatten().tolist()]
        if missing:
            log.warning("no sample of class %s in the %s data", ", ".join(map(str, missing)), stage)


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
    """Return the file of each sample below the root of the dataset, as text that can be printed.

    None if the dataset has no attributes `root` and `paths`.
    """
    files = sample_files(dataset)
    if files is None:
        return None
    root = str(_innermost(dataset).root)  # type: ignore[attr-defined]
    return [printable(file.relative_to(root)) for file in files]


def sample_files(dataset: Dataset[Any]) -> list[Path] | None:
    """Return the path of each sample's file, from the attributes `root` and `paths`."""
    if isinstance(dataset, Subset):
        files = sample_files(dataset.dataset)
        return None if files is None else [files[index] for index in dataset.indices]
    root, paths = getattr(dataset, "root", None), getattr(dataset, "paths", None)
    return None if root is None or paths is None else [Path(root, path) for path in paths]


def _innermost(dataset: Dataset[Any]) -> Dataset[Any]:
    return _innermost(dataset.dataset) if isinstance(dataset, Subset) else dataset


def printable(path: Path) -> str:
    """Return a path as text; bytes that are no text, and control characters, become escapes."""
    text = path.as_posix()
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
