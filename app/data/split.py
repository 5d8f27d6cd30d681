"""Splitting of the training data into stages, and checks of the datasets of all stages."""

from __future__ import annotations

import logging
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from app.data.rows import select_rows
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
    folds: tuple[int, int] | None = None,
    groups: Sequence[Hashable] | None = None,
) -> dict[str, Dataset[Any]]:
    """Split validation and test data off the training data.

    Args:
        datasets: Datasets by stage.
        valid: Number of samples (int), fraction of the training data (float), or None.
        test: Same as `valid`, for test data.
        seed: The choice of samples depends only on the seed.
        labels: Class of each training sample, shape (N,), if every part shall have each class in
            the same proportion.
        folds: Number of folds, and the fold that is the validation data; then `valid` is ignored.
        groups: Group of each training sample, whose samples stay in one part; None if there are no
            groups.

    Raises:
        UserError: No training sample would be left, or the training data is iterable.
    """
    if valid is None and test is None and folds is None:
        return datasets
    if isinstance(datasets["train"], IterableDataset):
        raise UserError(
            f"data.split.valid={valid!r} and data.split.test={test!r}: an iterable dataset cannot "
            "be split; set data.source.valid and data.source.test"
        )
    total = dataset_size(datasets["train"])
    sizes = [0 if folds else _split_size(valid, total), _split_size(test, total)]
    rest, num_folds = total - sum(sizes), folds[0] if folds else 1
    if rest < num_folds:
        raise UserError(
            f"data.split.valid={valid!r} and data.split.test={test!r} leave {max(0, rest)} of the "
            f"{total} training samples; needed: {num_folds}"
        )
    order = torch.randperm(
        total, generator=torch.Generator().manual_seed(derive_seed(seed, "split"))
    )
    if groups is not None:
        fold_sizes = [rest // num_folds + (i < rest % num_folds) for i in range(num_folds)]
        parts = split_groups(order, groups, labels, [*fold_sizes, *sizes])
    else:
        order = order if labels is None else _stratified(order, labels)
        train, *others = order.split([rest, *sizes])
        parts = [*train.tensor_split(num_folds), *others]
    if folds:
        held_out = parts.pop(folds[1])
        parts = [torch.cat(parts[: num_folds - 1]), held_out, parts[-1]]
    indices = dict(zip(("train", "valid", "test"), parts, strict=True))
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


def split_groups(
    order: Tensor, groups: Sequence[Hashable], labels: Tensor | None, sizes: Sequence[int]
) -> list[Tensor]:
    """Divide samples into parts without dividing a group.

    The largest groups are assigned first, each to the part where it brings the numbers of samples
    per class closest to the wanted ones.

    Args:
        order: Indices of the samples, in random order.
        groups: Group of each sample.
        labels: Class of each sample, if the parts shall have the same proportions; else None.
        sizes: Wanted number of samples in each part.

    Raises:
        UserError: There are fewer groups than parts.
    """
    members: dict[Hashable, list[int]] = {}
    for index in order.tolist():
        members.setdefault(groups[index], []).append(index)
    num_parts = sum(size > 0 for size in sizes)
    if len(members) < num_parts:
        raise UserError(f"{len(members)} groups cannot be divided into {num_parts} parts")
    classes = torch.zeros(len(order), dtype=torch.int64) if labels is None else labels
    counts = torch.bincount(classes).double()
    missing = torch.tensor(sizes, dtype=torch.float64)[:, None] / len(order) * counts
    parts: list[list[int]] = [[] for _ in sizes]
    for group in sorted(members.values(), key=len, reverse=True):
        found = torch.bincount(classes[group], minlength=len(counts)).double()
        # How much the squared deviation from the wanted numbers grows, part by part
        growth = (found * (found - 2 * missing)).sum(1)
        growth[[size == 0 for size in sizes]] = torch.inf
        best = int(growth.argmin())
        missing[best] -= found
        parts[best] += group
    if any(size and not part for size, part in zip(sizes, parts, strict=True)):
        raise UserError(f"the groups are too large: one of {num_parts} parts stays empty")
    return [torch.tensor(part, dtype=torch.int64) for part in parts]


def sample_groups(dataset: Dataset[Any], pattern: str | None) -> list[Hashable] | None:
    """Return the group of each sample, whose samples must stay in one part; None without groups.

    Args:
        dataset: Its attribute `groups` is used if there is no pattern.
        pattern: Regular expression that finds the group in the path of a sample's file.

    Raises:
        UserError: The samples have no files, or a path does not match.
    """
    if pattern is None:
        groups = getattr(dataset, "groups", None)
        return None if groups is None else list(groups)
    paths = sample_paths(dataset)
    if paths is None:
        raise UserError(f"data.split.group_pattern={pattern!r} needs samples that are files")
    found = [re.search(pattern, path) for path in paths]
    unmatched = next((path for path, match in zip(paths, found, strict=True) if not match), None)
    if unmatched is not None:
        raise UserError(f"data.split.group_pattern={pattern!r} does not match {unmatched!r}")
    return [match[1] for match in found if match]


def class_weights(
    dataset: Dataset[Any],
    targets: Key,
    num_classes: int,
    power: float,
    ignore_index: int | None = None,
) -> list[float]:
    """Return a weight for each class that is inverse to its frequency.

    For class labels it is `(N / (K * n)) ** power` with N labels, K classes and n labels of the
    class, so that a label weighs 1 on average at a power of 1. For targets of several classes each
    it is the number of negatives per positive to this power.

    Args:
        dataset: The training data.
        targets: Key of the target within a sample.
        num_classes: Number of classes.
        power: Exponent; 0 gives equal weights.
        ignore_index: Label that is not counted.

    Raises:
        UserError: The labels are not available without reading the samples, or a class has none.
    """
    labels = dataset_labels(dataset, targets)
    if labels is None and isinstance(dataset, TensorDataset) and isinstance(targets, int):
        labels = dataset.tensors[targets]
    if labels is None:
        raise UserError(
            "data.class_weights='auto' needs labels: a dataset with `targets`, or one in memory"
        )
    if labels.is_floating_point() and labels.ndim == 2:
        positives = (labels > 0.5).sum(0)
        return weights_from_counts(positives, len(labels) - positives, power)
    known = labels[(labels >= 0) & (labels < num_classes)].long()
    if ignore_index is not None:
        known = known[known != ignore_index]
    counts = torch.bincount(known.flatten(), minlength=num_classes)
    return weights_from_counts(counts, counts.sum() / num_classes, power)


def weights_from_counts(counts: Tensor, reference: Tensor, power: float) -> list[float]:
    """Return `(reference / counts) ** power` for each class.

    Raises:
        UserError: A class has no sample.
    """
    if not counts.all():
        missing = ", ".join(map(str, (counts == 0).nonzero().flatten().tolist()))
        raise UserError(
            f"data.class_weights='auto': the training data have no sample of class {missing}; "
            "allowed: a list of weights"
        )
    ratios = reference.double() / counts.double()
    return [float(f"{ratio**power:.6g}") for ratio in ratios.tolist()]


def _split_size(part: int | float | None, total: int) -> int:
    if part is None:
        return 0
    return part if isinstance(part, int) else max(1, round(part * total))


def subset(dataset: Dataset[Any], indices: Tensor) -> Dataset[Any]:
    """Return the given samples; a `TensorDataset` remains one, so that batches can be indexed."""
    if isinstance(dataset, TensorDataset):
        return TensorDataset(
            *(select_rows(tensor, indices.to(tensor.device)) for tensor in dataset.tensors)
        )
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
    root = str(innermost(dataset).root)  # type: ignore[attr-defined]
    return [printable(file.relative_to(root)) for file in files]


def sample_files(dataset: Dataset[Any]) -> list[Path] | None:
    """Return the path of each sample's file, from the attributes `root` and `paths`."""
    if isinstance(dataset, Subset):
        files = sample_files(dataset.dataset)
        return None if files is None else [files[index] for index in dataset.indices]
    root, paths = getattr(dataset, "root", None), getattr(dataset, "paths", None)
    return None if root is None or paths is None else [Path(root, path) for path in paths]


def innermost(dataset: Dataset[Any]) -> Dataset[Any]:
    """Return the dataset that subsets are part of."""
    return innermost(dataset.dataset) if isinstance(dataset, Subset) else dataset


def base_dataset(dataset: Dataset[Any]) -> tuple[Dataset[Any], Tensor]:
    """Return the innermost dataset, and the index of each sample in it, shape (N,)."""
    if not isinstance(dataset, Subset):
        return dataset, torch.arange(dataset_size(dataset))
    base, indices = base_dataset(dataset.dataset)
    return base, indices[torch.as_tensor(dataset.indices)]


def printable(path: Path) -> str:
    """Return a path as text; bytes that are no text, and control characters, become escapes."""
    text = path.as_posix()
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
