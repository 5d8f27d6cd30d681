"""Say which data a run has used, so that another run can tell whether its data are the same.

Reading all data again would delay each run, so that a hash covers what is cheap to get: the names
and sizes of files, or the values of arrays in memory. Of more than 10,000 files or 16 MiB of an
array it covers all names and shapes, but only evenly spaced sizes and samples.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from app.data.split import dataset_size, innermost

MAX_ARRAY_BYTES = 16 * 2**20
MAX_FILES = 10_000
PATH_ATTRIBUTES = (
    "paths",
    "mask_paths",
    "annotation_paths",
)  # of datasets of files, below their attribute `root`


class _Hash(Protocol):
    def update(self, data: Any, /) -> None: ...


@dataclass(frozen=True)
class DataIdentity:
    """Which data a stage has.

    Attributes:
        samples: Number of samples; None if unknown.
        hash: SHA-256 that is equal for equal data; None if the data are of an unknown kind.
        hash_of: What the hash covers, or why there is none.
    """

    samples: int | None
    hash: str | None
    hash_of: str


def identify_data(dataset: Dataset[Any]) -> DataIdentity:
    """Return which data a dataset has, without reading its samples."""
    if isinstance(dataset, IterableDataset):
        return DataIdentity(None, None, "nothing: the data are iterable")
    samples, digest = dataset_size(dataset), hashlib.sha256()
    _update_with_indices(digest, dataset)
    hash_of = _update_with_source(digest, innermost(dataset))
    if hash_of is None:
        kind = type(innermost(dataset)).__name__
        return DataIdentity(samples, None, f"nothing: {kind} has neither files nor arrays")
    return DataIdentity(samples, digest.hexdigest(), hash_of)


def _update_with_indices(digest: _Hash, dataset: Dataset[Any]) -> None:
    while isinstance(dataset, Subset):
        digest.update(np.asarray(dataset.indices, dtype=np.int64))
        dataset = dataset.dataset


def _update_with_source(digest: _Hash, dataset: Dataset[Any]) -> str | None:
    """Add what identifies the samples of a dataset to a hash, and return what that is."""
    if isinstance(dataset, TensorDataset):
        parts = [_update_with_array(digest, tensor) for tensor in dataset.tensors]
        return "the arrays" if all(parts) else "evenly spaced samples of the arrays"
    if hasattr(dataset, "root") and hasattr(dataset, "paths"):
        digest.update(repr(_plain_labels(dataset)).encode())
        files = [name for attribute in PATH_ATTRIBUTES for name in getattr(dataset, attribute, ())]
        return _update_with_files(digest, Path(dataset.root), files)
    if hasattr(dataset, "fingerprint"):
        digest.update(str(dataset.fingerprint()).encode())
        return "the fingerprint of the rows"
    return None


def _plain_labels(dataset: Dataset[Any]) -> list[int] | None:
    labels = getattr(dataset, "targets", None)
    return labels if isinstance(labels, list) else None


def _update_with_array(digest: _Hash, tensor: Tensor) -> bool:
    """Add an array to a hash, and return whether all of it is covered."""
    digest.update(f"{tuple(tensor.shape)} {tensor.dtype} ".encode())
    num_bytes = tensor.numel() * tensor.element_size()
    every = -(-num_bytes // MAX_ARRAY_BYTES)
    if every > 1:
        tensor = tensor[::every]
    # As bytes, because NumPy has no bfloat16.
    digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return every <= 1


def _update_with_files(digest: _Hash, root: Path, names: Sequence[str | Path]) -> str:
    every = max(1, -(-len(names) // MAX_FILES))
    for index, name in enumerate(names):
        size = _file_size(root / name) if index % every == 0 else ""
        digest.update(os.fsencode(name) + f"\0{size}\0".encode())
    some = "" if every == 1 else f", and sizes of every {every}th"
    return f"{'names and sizes' if every == 1 else 'names'} of {len(names):,} files{some}"


def _file_size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:  # the error of reading it says more
        return None
