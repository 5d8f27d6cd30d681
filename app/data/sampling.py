"""How likely each sample is to be drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from app.runtime.errors import UserError
from app.runtime.seed import derive_seed


class BalancedClasses:
    """Each class as likely as any other that has samples."""

    def __call__(self, labels: Tensor) -> Tensor:
        """Labels, whole numbers of shape (N,), to weights, float64 of shape (N,).

        Raises:
            UserError: They are no labels.
        """
        _check_labels(labels)
        counts = torch.bincount(labels)
        return counts.double().reciprocal()[labels]


class ClassWeights:
    """A weight for each class, whatever the number of its samples.

    Args:
        weights: In the order of the classes' numbers.

    Raises:
        UserError: A weight is negative or not finite, or all are zero.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = torch.tensor(list(weights), dtype=torch.float64)
        _check_weights("weights", self.weights)

    def __call__(self, labels: Tensor) -> Tensor:
        """Labels, whole numbers of shape (N,), to weights, float64 of shape (N,).

        Raises:
            UserError: They are no labels, or a class has no weight, or none is left to be drawn.
        """
        _check_labels(labels)
        highest = int(labels.max())
        if highest >= len(self.weights):
            raise UserError(
                f"weights has {len(self.weights)} numbers, but the samples have the label {highest}"
            )
        weights = self.weights[labels]
        _check_weights("weights of the classes that have samples", weights)
        return weights


class SampleWeights:
    """A weight for each sample, from a file.

    Args:
        path: A `.npy` file with an array of shape (N,), or a table (`.csv`) of one column, with
            or without a header; in the order of the data.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, labels: Tensor) -> Tensor:
        """The weights, float64 of shape (N,); of the labels only their number counts.

        Raises:
            UserError: The file is missing or damaged, has another number of weights than there
                are samples, or a weight that is negative or not finite, or zeros alone.
        """
        weights = torch.from_numpy(_read(self.path))
        if len(weights) != len(labels):
            raise UserError(f"{self.path}: {len(weights)} weights for {len(labels)} samples")
        _check_weights(self.path, weights)
        return weights


def draw(weights: Tensor, count: int, seed: int) -> Tensor:
    """Samples drawn with replacement, in proportion to their weights.

    Unlike `torch.multinomial`, for any number of samples.

    Args:
        weights: Of shape (N,), on the host; finite, not negative, not all zero.
        count: How many are drawn.
        seed: For the same weights, what is drawn depends on it alone.

    Returns:
        Indices, int64 of shape (count,).

    Raises:
        UserError: The weights cannot be drawn from.
    """
    _check_weights("weights", weights)
    if count < 0:
        raise ValueError(f"count={count} must be at least 0")
    generator = torch.Generator().manual_seed(seed)
    ends = weights.double().cumsum(0)
    places = torch.rand(count, dtype=torch.float64, generator=generator) * ends[-1]
    # right=True: a sample of weight 0 ends where it starts, and is never drawn.
    return torch.searchsorted(ends, places, right=True)


def _read(path: str) -> np.ndarray:
    if not Path(path).is_file():
        raise UserError(f"{path!r} is not a file")
    readers = {".npy": _read_npy, ".csv": _read_csv}
    if Path(path).suffix not in readers:
        raise UserError(f"{path!r} is of no known kind; allowed: .csv, .npy")
    try:
        return readers[Path(path).suffix](path)
    except UserError:
        raise
    except (ValueError, EOFError, OSError) as error:  # ValueError: also pandas' and Unicode errors
        raise UserError(f"{path} cannot be read as weights: {error}") from error


def _read_npy(path: str) -> np.ndarray:
    weights = np.load(path, allow_pickle=False)
    if not isinstance(weights, np.ndarray) or weights.ndim != 1 or weights.dtype.kind not in "uif":
        raise UserError(f"{path} holds no array of numbers of shape (N,)")
    return weights.astype(np.float64)


def _read_csv(path: str) -> np.ndarray:
    table = pd.read_csv(path, header=None, skip_blank_lines=False)
    if table.shape[1] != 1:
        raise UserError(f"{path}: {table.shape[1]} columns; allowed: 1")
    numbers = pd.to_numeric(table[0], errors="coerce").to_numpy(np.float64)
    header = int(bool(np.isnan(numbers[0])))
    wrong = np.flatnonzero(np.isnan(numbers[header:])) + header
    if len(wrong):
        cell = table[0].iloc[wrong[0]]
        raise UserError(f"{path}: line {wrong[0] + 1}: {cell} is no number")
    return numbers[header:].copy()


def _check_labels(labels: Tensor) -> None:
    if labels.ndim != 1 or not len(labels) or labels.is_floating_point() or labels.is_complex():
        raise UserError(
            f"{labels.dtype} of shape {tuple(labels.shape)} are no labels; allowed: whole numbers "
            "of shape (N,)"
        )
    if int(labels.min()) < 0:
        raise UserError(f"the label {int(labels.min())} is negative; allowed: 0, 1, ...")


def _check_weights(name: str, weights: Tensor) -> None:
    if weights.ndim != 1 or not len(weights):
        raise UserError(f"{name}: shape {tuple(weights.shape)}; allowed: (N,)")
    wrong = (~weights.isfinite() | (weights < 0)).nonzero().flatten()
    if len(wrong):
        place = int(wrong[0])
        raise UserError(f"{name}: {weights[place]:g} at {place}; allowed: finite numbers from 0 on")
    if not weights.any():
        raise UserError(f"{name}: all are 0; allowed: at least one above")


@dataclass(frozen=True)
class EpochSampler:
    """Which samples come when.

    Attributes:
        total: Samples in the dataset.
        count: How many of them an epoch takes.
        shuffle_seed: None keeps the dataset's own order.
        weights: How likely each sample is, drawn with replacement; None takes each once.
    """

    total: int
    count: int
    shuffle_seed: int | None
    weights: Tensor | None = None

    @classmethod
    def limited(
        cls,
        total: int,
        batch_size: int,
        limit: int | float | None,
        shuffle_seed: int | None,
        weights: Tensor | None = None,
    ) -> EpochSampler:
        """The order of as many batches as `limit` says: a number, a share, or None for all."""
        batches = -(-total // batch_size)
        wanted = max(1, int(limit * batches)) if isinstance(limit, float) else limit
        count = total if wanted is None else min(total, wanted * batch_size)
        return cls(total, count, shuffle_seed, weights)

    def of_whole_batches(self, batch_size: int) -> EpochSampler:
        """The same without a short last batch.

        Raises:
            UserError: Nothing is left.
        """
        count = self.count - self.count % batch_size
        if count == 0:
            raise UserError(f"data.drop_last: {self.count} samples make no batch of {batch_size}")
        return replace(self, count=count)

    @property
    def is_plain(self) -> bool:
        """Whether samples come as they stand in the dataset."""
        return self.shuffle_seed is None

    def indices(self, epoch: int) -> Tensor:
        """Positions in the dataset, int64."""
        if self.shuffle_seed is None:
            return torch.arange(self.count)
        seed = derive_seed(self.shuffle_seed, "order", epoch)
        if self.weights is not None:
            return draw(self.weights, self.count, seed)
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(self.total, generator=generator)[: self.count]

    def of_batch(self, epoch: int, step: int, batch_size: int) -> Tensor:
        """Those of one batch of the epoch, counted from 1; of all ranks together."""
        return self.indices(epoch)[(step - 1) * batch_size : step * batch_size]
