"""Datasets that are read once and kept in memory, optionally in a cache file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from app.data.archives import read_npz
from app.data.split import dataset_size
from app.runtime.errors import UserError
from app.runtime.files import atomic_write

ARRAY_NAMES = ("inputs", "targets")


def cached(dataset: Dataset[Any], file: str | None = None, num_workers: int = 0) -> TensorDataset:
    """Read every sample of a dataset once; random transforms in it are applied only once, too.

    Args:
        dataset: Map-style, of (input, target): tensors, arrays or numbers, each of the same shape
            and dtype in all samples.
        file: An `.npz` cache file; if it exists, it is read instead of the dataset, else it is
            written. It must be deleted when the data change.
        num_workers: Worker processes that read samples; 0 reads in this process.

    Raises:
        UserError: The samples differ in shape or dtype, or the file is damaged or belongs to
            another dataset.
    """
    if file is None:
        return TensorDataset(*_read(dataset, num_workers))
    path = Path(file)
    if path.suffix != ".npz":
        raise UserError(f"file={file!r} must end in .npz")
    if path.exists():
        return TensorDataset(*_load(path, dataset_size(dataset)))
    tensors = _read(dataset, num_workers)
    _save(path, tensors)
    return TensorDataset(*tensors)


def _read(dataset: Dataset[Any], num_workers: int) -> tuple[Tensor, ...]:
    total = dataset_size(dataset)
    if total == 0:
        raise UserError("there are no samples to read")
    # A separate generator, so that reading does not advance the global one.
    loader = DataLoader(
        dataset, batch_size=None, num_workers=num_workers, generator=torch.Generator()
    )
    stacked: tuple[Tensor, ...] = ()
    for index, sample in enumerate(loader):
        parts = _to_tensors(index, sample)
        stacked = stacked or tuple(part.new_empty(total, *part.shape) for part in parts)
        for name, tensor, part in zip(ARRAY_NAMES, stacked, parts, strict=True):
            _check_same_form(index, name, part, tensor)
            tensor[index] = part
    return stacked


def _to_tensors(index: int, sample: object) -> tuple[Tensor, ...]:
    if not isinstance(sample, (tuple, list)) or len(sample) != len(ARRAY_NAMES):
        raise UserError(f"sample {index} is not an (input, target) pair")
    try:
        return tuple(torch.as_tensor(part) for part in sample)
    except (TypeError, ValueError, RuntimeError) as error:
        types = ", ".join(type(part).__name__ for part in sample)
        raise UserError(
            f"sample {index} ({types}) cannot be converted to tensors: {error}"
        ) from error


def _check_same_form(index: int, name: str, part: Tensor, stacked: Tensor) -> None:
    if (part.shape, part.dtype) != (stacked.shape[1:], stacked.dtype):
        raise UserError(
            f"sample {index}: {name} have shape {list(part.shape)} ({part.dtype}), those of "
            f"sample 0 {list(stacked.shape[1:])} ({stacked.dtype}); all samples must match"
        )


def _save(path: Path, tensors: tuple[Tensor, ...]) -> None:
    inputs, targets = (tensor.numpy() for tensor in tensors)
    # Several processes may write the cache at once: each writes its own file, the last one wins.
    temporary = path.with_name(f"{path.stem}.{os.getpid()}.npz")
    atomic_write(temporary, lambda file: np.savez(file, inputs=inputs, targets=targets))
    temporary.replace(path)


def _load(path: Path, count: int) -> tuple[Tensor, ...]:
    try:
        tensors = tuple(torch.from_numpy(array) for array in read_npz(path, ARRAY_NAMES))
    except (UserError, TypeError) as error:  # TypeError: a dtype that torch does not have
        raise UserError(f"{error}; delete {path} to read the data again") from error
    for name, tensor in zip(ARRAY_NAMES, tensors, strict=True):
        if tensor.ndim == 0 or len(tensor) != count:
            raise UserError(
                f"{path} contains {name} of shape {list(tensor.shape)}, but the dataset has "
                f"{count} samples; delete it to read the data again"
            )
    return tensors
