"""Order of samples in each epoch, and weights for drawing them at random."""

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


@dataclass(frozen=True)
class EpochSampler:
    """Chooses the samples of each epoch and their order.

    Attributes:
        dataset_size: Samples in the dataset.
        num_samples: Samples per epoch.
        shuffle_seed: None keeps the order of the dataset.
        weights: Weight of each sample for drawing with replacement; None takes each sample once.
    """

    dataset_size: int
    num_samples: int
    shuffle_seed: int | None
    weights: Tensor | None = None

    @classmethod
    def from_limit(
        cls,
        dataset_size: int,
        batch_size: int,
        limit: int | float | None,
        shuffle_seed: int | None,
        weights: Tensor | None = None,
    ) -> EpochSampler:
        """Make a sampler for a number (int) or fraction (float) of batches, or None for all."""
        batches = -(-dataset_size // batch_size)
        max_batches = max(1, int(limit * batches)) if isinstance(limit, float) else limit
        num_samples = (
            dataset_size if max_batches is None else min(dataset_size, max_batches * batch_size)
        )
        return cls(dataset_size, num_samples, shuffle_seed, weights)

    def drop_last(self, batch_size: int) -> EpochSampler:
        """Return a sampler without an incomplete last batch.

        Raises:
            UserError: No batch is left.
        """
        num_samples = self.num_samples - self.num_samples % batch_size
        if num_samples == 0:
            raise UserError(
                f"data.drop_last=true: {self.num_samples} samples do not fill a batch of "
                f"{batch_size}"
            )
        return replace(self, num_samples=num_samples)

    def indices(self, epoch: int) -> Tensor:
        """Return the dataset indices of an epoch, int64 of shape (num_samples,)."""
        if self.shuffle_seed is None:
            return torch.arange(self.num_samples)
        seed = derive_seed(self.shuffle_seed, "order", epoch)
        if self.weights is not None:
            return draw_with_replacement(self.weights, self.num_samples, seed)
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(self.dataset_size, generator=generator)[: self.num_samples]

    def batch_indices(self, epoch: int, step: int, batch_size: int) -> Tensor:
        """Return the dataset indices of a global batch; steps are counted from 1."""
        return self.indices(epoch)[(step - 1) * batch_size : step * batch_size]


def draw_with_replacement(weights: Tensor, count: int, seed: int) -> Tensor:
    """Draw sample indices with replacement, in proportion to their weights.

    Unlike `torch.multinomial`, it works for any number of samples.

    Args:
        weights: Shape (N,), on the CPU; finite, not negative, not all zero.
        count: Number of draws.
        seed: For given weights, the result depends only on the seed.

    Returns:
        Indices, int64 of shape (count,).

    Raises:
        UserError: The weights are invalid.
    """
    _check_weights("weights", weights)
    if count < 0:
        raise ValueError(f"count={count} must be at least 0")
    generator = torch.Generator().manual_seed(seed)
    cumulative = weights.double().cumsum(0)
    points = torch.rand(count, dtype=torch.float64, generator=generator) * cumulative[-1]
    # right=True: the interval of a sample of weight 0 is empty, so it is never drawn.
    return torch.searchsorted(cumulative, points, right=True)


class BalancedClasses:
    """Sample weights that make every class equally likely."""

    def __call__(self, labels: Tensor) -> Tensor:
        """Return the weight of each sample, float64 of shape (N,).

        Args:
            labels: Class indices of shape (N,).

        Raises:
            UserError: The labels are not class indices.
        """
        _check_labels(labels)
        counts = torch.bincount(labels)
        return counts.double().reciprocal()[labels]


class ClassWeights:
    """Sample weights given by class, regardless of the number of samples in it.

    Args:
        weights: One weight per class, in the order of the class indices.

    Raises:
        UserError: A weight is negative or not finite, or all are zero.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = torch.tensor(list(weights), dtype=torch.float64)
        _check_weights("weights", self.weights)

    def __call__(self, labels: Tensor) -> Tensor:
        """Return the weight of each sample, float64 of shape (N,).

        Args:
            labels: Class indices of shape (N,).

        Raises:
            UserError: The labels are not class indices, a class has no weight, or all samples
                have weight zero.
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
    """Sample weights read from a file.

    Args:
        path: A `.npy` file with an array of shape (N,), or a `.csv` table of one column, with or
            without a header; in the order of the dataset.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, labels: Tensor) -> Tensor:
        """Return the weight of each sample, float64 of shape (N,).

        Args:
            labels: Only their number is used.

        Raises:
            UserError: The file is missing or damaged, the number of weights differs from the
                number of samples, a weight is negative or not finite, or all are zero.
        """
        weights = torch.from_numpy(_read_weights(self.path))
        if len(weights) != len(labels):
            raise UserError(
                f"{self.path} has {len(weights)} weights, but the dataset has {len(labels)} samples"
            )
        _check_weights(self.path, weights)
        return weights


def _read_weights(path: str) -> np.ndarray:
    if not Path(path).is_file():
        raise UserError(f"{path!r} is not a file")
    readers = {".npy": _read_npy, ".csv": _read_csv}
    if Path(path).suffix not in readers:
        raise UserError(f"{path!r} has an unknown file type; allowed: .csv, .npy")
    try:
        return readers[Path(path).suffix](path)
    except UserError:
        raise
    except (ValueError, EOFError, OSError) as error:  # ValueError: also pandas' and Unicode errors
        raise UserError(f"{path} cannot be read as weights: {error}") from error


def _read_npy(path: str) -> np.ndarray:
    weights = np.load(path, allow_pickle=False)
    if not isinstance(weights, np.ndarray) or weights.ndim != 1 or weights.dtype.kind not in "uif":
        raise UserError(f"{path} does not contain a numeric array of shape (N,)")
    return weights.astype(np.float64)


def _read_csv(path: str) -> np.ndarray:
    table = pd.read_csv(path, header=None, skip_blank_lines=False)
    if table.shape[1] != 1:
        raise UserError(f"{path}: {table.shape[1]} columns; allowed: 1")
    numbers = pd.to_numeric(table[0], errors="coerce").to_numpy(np.float64)
    header_lines = int(bool(np.isnan(numbers[0])))
    invalid = np.flatnonzero(np.isnan(numbers[header_lines:])) + header_lines
    if len(invalid):
        cell = table[0].iloc[invalid[0]]
        raise UserError(f"{path}: line {invalid[0] + 1}: {cell} is not a number")
    return numbers[header_lines:].copy()


def _check_labels(labels: Tensor) -> None:
    if labels.ndim != 1 or not len(labels) or labels.is_floating_point() or labels.is_complex():
        raise UserError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}; allowed: integers of "
            "shape (N,)"
        )
    if int(labels.min()) < 0:
        raise UserError(f"the label {int(labels.min())} is negative; allowed: 0, 1, ...")


def _check_weights(name: str, weights: Tensor) -> None:
    if weights.ndim != 1 or not len(weights):
        raise UserError(f"{name}: shape {tuple(weights.shape)}; allowed: (N,)")
    invalid = (~weights.isfinite() | (weights < 0)).nonzero().flatten()
    if len(invalid):
        index = int(invalid[0])
        raise UserError(
            f"{name}: {weights[index]:g} at index {index}; allowed: finite numbers of at least 0"
        )
    if not weights.any():
        raise UserError(f"{name}: all are 0; allowed: at least one above 0")
