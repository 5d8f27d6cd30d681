"""Sliding windows over large samples, and inference on windows; in any number of dimensions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from app.data.split import dataset_size
from app.runtime.errors import UserError

# Index of a window: an ellipsis for the leading dimensions, then a slice per spatial dimension.
WindowIndex = tuple[EllipsisType | slice, ...]


def sliding_window(x: Tensor, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Cut windows over the last `len(size)` dimensions.

    If the strides do not end at the border, the last window of a dimension is moved back to end
    there, so that the windows cover everything.

    Args:
        x: Shape (*leading, *spatial), any dtype.
        size: Window size in each spatial dimension.
        stride: Step between windows in each spatial dimension; at most the size, so that there
            are no gaps.

    Returns:
        Windows of shape (W, *leading, *size), in row-major order.

    Raises:
        ValueError: A window does not fit into x, or the strides leave gaps.
    """
    indices = _window_indices(_last(x.shape, len(size)), size, stride)
    return torch.stack([x[index] for index in indices])


def reversed_sliding_window(windows: Tensor, shape: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Merge the windows of `sliding_window`, and average them where they overlap.

    Args:
        windows: Floating point, shape (W, *leading, *size); the leading dimensions may differ
            from those of the original tensor.
        shape: Spatial dimensions of the result.
        stride: The stride given to `sliding_window`.

    Returns:
        Shape (*leading, *shape), dtype of the windows.

    Raises:
        ValueError: Number or size of the windows does not match the shape and stride, or the
            windows contain integers, which cannot be averaged.
    """
    if len(shape) >= windows.ndim:
        raise ValueError(f"shape={list(shape)} has too many dimensions for {_shape(windows)}")
    first = windows.ndim - len(shape)
    indices = _window_indices(shape, windows.shape[first:], stride)
    if len(windows) != len(indices):
        raise ValueError(
            f"{len(windows)} windows, but shape={list(shape)} and stride={list(stride)} "
            f"make {len(indices)}"
        )
    total = _zeros(windows, [*windows.shape[1:first], *shape])
    for window, index in zip(windows, indices, strict=True):
        total[index] += window
    return (total / _coverage(total, shape, indices)).to(windows.dtype)


class WindowDataset(Dataset[tuple[Tensor, Any]]):
    """Dataset of the windows of all samples of another dataset.

    A target whose last dimensions match those of the input is cut the same way; any other target
    (a label) is returned as is.

    Args:
        dataset: Map-style, of (input, target); all inputs have the same shape
            (*leading, *spatial).
        size: Window size in each spatial dimension.
        stride: Step between windows in each spatial dimension.

    Raises:
        ValueError: A window does not fit into a sample, or the strides leave gaps.
        UserError: The dataset is empty, or (when indexed) a sample has another shape than the
            first.
    """

    def __init__(self, dataset: Dataset[Any], size: Sequence[int], stride: Sequence[int]) -> None:
        if dataset_size(dataset) == 0:
            raise UserError("there are no samples to cut windows from")
        x: Tensor = dataset[0][0]
        self.dataset, self.shape = dataset, x.shape
        self.spatial = _last(x.shape, len(size))
        self.window_indices = _window_indices(self.spatial, size, stride)

    def __len__(self) -> int:
        return dataset_size(self.dataset) * len(self.window_indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        """Return a window of shape (*leading, *size), and its target."""
        if not 0 <= index < len(self):
            raise IndexError(f"window index {index} is out of range ({len(self)} windows)")
        sample, number = divmod(index, len(self.window_indices))
        x, target = self.dataset[sample]
        if x.shape != self.shape:
            raise UserError(f"sample {sample} has {_shape(x)}, sample 0 has {list(self.shape)}")
        window = self.window_indices[number]
        is_dense = (
            isinstance(target, Tensor) and _last(target.shape, len(self.spatial)) == self.spatial
        )
        return x[window], target[window] if is_dense else target


class PatchInference:
    """Runs a model on windows of large inputs, and averages the outputs where windows overlap.

    Args:
        size: Window size in each spatial dimension.
        overlap: Fraction of a window shared with the next one; at least 0 and below 1.
        batch_size: Windows per forward pass.
    """

    def __init__(self, size: Sequence[int], overlap: float = 0.25, batch_size: int = 8) -> None:
        if not size or min(size) < 1:
            raise ValueError(f"size={list(size)} must have numbers of at least 1")
        if not 0 <= overlap < 1:
            raise ValueError(f"overlap={overlap} must be at least 0 and below 1")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self.size, self.batch_size = tuple(size), batch_size
        # Rounded first: 20 * (1 - 0.9) is 1.9999999999999996.
        self.stride = [max(1, int(round(length * (1 - overlap), 6))) for length in size]

    def __call__(self, model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return the model's output for the entire input.

        Args:
            model: Maps (B, C, *size) to floating-point outputs of shape (B, K, *size).
            x: Shape (N, C, *spatial); padded with zeros where it is smaller than a window.

        Returns:
            Shape (N, K, *spatial), dtype of the model's output.

        Raises:
            ValueError: The input has other dimensions, or the output does not have the size of
                the windows.
        """
        if x.ndim != len(self.size) + 2 or not len(x):
            raise ValueError(
                f"size={list(self.size)} needs inputs of shape (N, C) and {len(self.size)} more "
                f"dimensions, not {_shape(x)}"
            )
        padded, original = self._pad(x)
        return self._predict(model, padded)[original]

    def _pad(self, x: Tensor) -> tuple[Tensor, WindowIndex]:
        """Pad the input to at least a window; also return the index of the original in it."""
        missing = [max(0, size - n) for size, n in zip(self.size, x.shape[2:], strict=True)]
        ends = zip(missing, x.shape[2:], strict=True)
        original: WindowIndex = (..., *(slice(m // 2, m // 2 + n) for m, n in ends))
        padding = [side for m in reversed(missing) for side in (m // 2, m - m // 2)]
        return F.pad(x, padding), original

    def _predict(self, model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        indices = _window_indices(x.shape[2:], self.size, self.stride)
        windows = list(itertools.product(range(len(x)), indices))
        total: Tensor | None = None
        for start in range(0, len(windows), self.batch_size):
            batch = windows[start : start + self.batch_size]
            outputs = model(torch.stack([x[sample][index] for sample, index in batch]))
            self._check_outputs(outputs, len(batch))
            if total is None:
                total = _zeros(outputs, [len(x), outputs.shape[1], *x.shape[2:]])
            for (sample, index), output in zip(batch, outputs, strict=True):
                total[sample][index] += output
        assert total is not None
        return (total / _coverage(total, x.shape[2:], indices)).to(outputs.dtype)

    def _check_outputs(self, outputs: Tensor, count: int) -> None:
        shape = tuple(outputs.shape)
        if len(shape) != len(self.size) + 2 or (shape[0], shape[2:]) != (count, self.size):
            raise ValueError(
                f"{count} windows of size {list(self.size)} gave an output of {_shape(outputs)}; "
                f"allowed: ({count}, K, {', '.join(map(str, self.size))})"
            )


def _window_indices(
    shape: Sequence[int], size: Sequence[int], stride: Sequence[int]
) -> list[WindowIndex]:
    if not len(shape) == len(size) == len(stride) > 0:
        raise ValueError(
            f"size={list(size)} and stride={list(stride)} must have a number for each of the "
            f"{len(shape)} dimensions of {list(shape)}"
        )
    for length, window, step in zip(shape, size, stride, strict=True):
        if not 1 <= window <= length:
            raise ValueError(f"size={list(size)} must be between 1 and the shape {list(shape)}")
        if not 1 <= step <= window:
            raise ValueError(f"stride={list(stride)} must be between 1 and the size {list(size)}")
    slices_by_dimension = [
        [slice(start, start + window) for start in _window_starts(length, window, step)]
        for length, window, step in zip(shape, size, stride, strict=True)
    ]
    return [(..., *slices) for slices in itertools.product(*slices_by_dimension)]


def _window_starts(length: int, window: int, step: int) -> list[int]:
    last = length - window
    return [*range(0, last, step), last]


def _coverage(total: Tensor, shape: Sequence[int], indices: list[WindowIndex]) -> Tensor:
    """Count the windows that cover each element of `shape`, in the dtype of `total`."""
    counts = total.new_zeros(*shape)
    for index in indices:
        counts[index] += 1
    return counts


def _last(shape: Sequence[int], count: int) -> Sequence[int]:
    return shape[max(0, len(shape) - count) :]


def _zeros(like: Tensor, shape: Sequence[int]) -> Tensor:
    if not like.is_floating_point():
        raise ValueError(f"windows of {like.dtype} cannot be averaged; allowed: floating point")
    # At least float32: long sums in half precision would lose small terms.
    return like.new_zeros(*shape, dtype=torch.promote_types(like.dtype, torch.float32))


def _shape(x: Tensor) -> str:
    return f"shape {list(x.shape)}"
