"""Samples read once, and whole in memory from then on."""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from app.data.archives import check_npz
from app.data.split import size
from app.runtime.errors import UserError
from app.runtime.files import atomic_write

ARRAYS = ("inputs", "targets")
# What NumPy and zipfile raise for files with wrong bits.
DAMAGES = (
    zipfile.BadZipFile,
    EOFError,
    OSError,
    KeyError,
    ValueError,
    TypeError,
    RuntimeError,
    MemoryError,
    SyntaxError,
    zlib.error,
)


def cached(dataset: Dataset[Any], file: str | None = None, num_workers: int = 0) -> TensorDataset:
    """Every sample of a dataset, read once: what is random in reading it is drawn once for all.

    Args:
        dataset: Map-style, of (input, target): tensors, arrays or numbers of one shape and type.
        file: An `.npz` file that keeps what was read; a later run reads it instead of the
            dataset. It must be deleted when the data change.
        num_workers: Processes that read; 0 reads in this one.

    Raises:
        UserError: The samples are not alike, or the file is damaged or of another dataset.
    """
    if file is None:
        return TensorDataset(*_read(dataset, num_workers))
    path = Path(file)
    if path.suffix != ".npz":
        raise UserError(f"file={file!r} must end in .npz")
    if path.exists():
        return TensorDataset(*_load(path, size(dataset)))
    tensors = _read(dataset, num_workers)
    _save(path, tensors)
    return TensorDataset(*tensors)


def _read(dataset: Dataset[Any], num_workers: int) -> tuple[Tensor, ...]:
    total = size(dataset)
    if total == 0:
        raise UserError("there are no samples to read")
    # A generator of its own, so that reading leaves the program's randomness as it was.
    loader = DataLoader(
        dataset, batch_size=None, num_workers=num_workers, generator=torch.Generator()
    )
    whole: tuple[Tensor, ...] = ()
    for index, sample in enumerate(loader):
        parts = _tensors(index, sample)
        whole = whole or tuple(part.new_empty(total, *part.shape) for part in parts)
        for name, tensor, part in zip(ARRAYS, whole, parts, strict=True):
            _check_alike(index, name, part, tensor)
            tensor[index] = part
    return whole


def _tensors(index: int, sample: object) -> tuple[Tensor, ...]:
    if not isinstance(sample, (tuple, list)) or len(sample) != len(ARRAYS):
        raise UserError(f"sample {index} is no pair of input and target")
    try:
        return tuple(torch.as_tensor(part) for part in sample)
    except (TypeError, ValueError, RuntimeError) as error:
        kinds = ", ".join(type(part).__name__ for part in sample)
        raise UserError(f"sample {index} ({kinds}) cannot become tensors: {error}") from error


def _check_alike(index: int, name: str, part: Tensor, whole: Tensor) -> None:
    if (part.shape, part.dtype) != (whole.shape[1:], whole.dtype):
        raise UserError(
            f"sample {index}: {name} have shape {list(part.shape)} ({part.dtype}), those of "
            f"sample 0 {list(whole.shape[1:])} ({whole.dtype}); allowed: the same for all"
        )


def _save(path: Path, tensors: tuple[Tensor, ...]) -> None:
    inputs, targets = (tensor.numpy() for tensor in tensors)
    # Several processes may have read the data at once: each writes its own, the last one stays.
    own = path.with_name(f"{path.stem}.{os.getpid()}.npz")
    atomic_write(own, lambda file: np.savez(file, inputs=inputs, targets=targets))
    own.replace(path)


def _load(path: Path, count: int) -> tuple[Tensor, ...]:
    try:
        check_npz(path)
        with np.load(path, allow_pickle=False) as file:
            tensors = tuple(torch.from_numpy(file[name]) for name in ARRAYS)
    except UserError:
        raise
    except DAMAGES as error:
        raise UserError(f"{path} is damaged: {error}; delete it to read the data anew") from error
    for name, tensor in zip(ARRAYS, tensors, strict=True):
        if tensor.ndim == 0 or len(tensor) != count:
            raise UserError(
                f"{path} holds {name} of shape {list(tensor.shape)}, but the dataset has {count} "
                "samples; delete it to read the data anew"
            )
    return tensors
