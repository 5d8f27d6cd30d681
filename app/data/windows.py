"""Large samples window by window, and back; in any number of dimensions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from app.data.split import size as count_of
from app.runtime.errors import UserError

Place = tuple[EllipsisType | slice, ...]  # of a window: leading dimensions whole, then slices


def sliding_window(x: Tensor, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Windows over the last dimensions, as many as `size` has.

    The last window of a dimension is moved back to end at the border, so that all is covered.

    Args:
        x: Of shape (*leading, *spatial), of any type.
        size: Of a window, a number for each spatial dimension.
        stride: The step from window to window; at most the size, which leaves no gap.

    Returns:
        Of shape (W, *leading, *size), windows in row-major order.

    Raises:
        ValueError: A window does not fit into x, or the steps leave gaps.
    """
    if len(size) > x.ndim:
        raise ValueError(f"size={list(size)} has more dimensions than shape {list(x.shape)}")
    places = _places(x.shape[x.ndim - len(size) :], size, stride)
    return torch.stack([x[place] for place in places])


def reversed_sliding_window(windows: Tensor, shape: Sequence[int], stride: Sequence[int]) -> Tensor:
    """What `sliding_window` cut, put together; where windows overlap, their mean.

    Args:
        windows: Floats of shape (W, *leading, *size); the leading dimensions may be others than
            before.
        shape: The spatial dimensions of the result.
        stride: That of `sliding_window`.

    Returns:
        Of shape (*leading, *shape), of the windows' type.

    Raises:
        ValueError: So many windows of that size do not come from that shape, or they hold whole
            numbers, which have no mean.
    """
    if len(shape) >= windows.ndim:
        raise ValueError(f"shape={list(shape)} has too many dimensions for {_shape(windows)}")
    if not windows.is_floating_point():
        raise ValueError(f"windows of {windows.dtype} cannot be averaged; allowed: floats")
    first = windows.ndim - len(shape)
    places = _places(shape, windows.shape[first:], stride)
    if len(windows) != len(places):
        raise ValueError(
            f"{len(windows)} windows, but shape={list(shape)} and stride={list(stride)} "
            f"make {len(places)}"
        )
    total = _zeros(windows, [*windows.shape[1:first], *shape])
    for window, place in zip(windows, places, strict=True):
        total[place] += window
    return (total / _coverage(total, shape, places)).to(windows.dtype)


class Windows(Dataset[tuple[Tensor, Any]]):
    """Each window of each sample as a sample of its own.

    A target whose last dimensions are those of the input is cut likewise; any other (a label)
    is kept as it is.

    Args:
        dataset: Map-style, of (input, target); the inputs have one shape (*leading, *spatial).
        size: Of a window, a number for each spatial dimension.
        stride: The step from window to window.

    Raises:
        ValueError: A window does not fit into a sample, or the steps leave gaps.
        UserError: The dataset is empty; on reading, a sample has another shape than the first.
    """

    def __init__(self, dataset: Dataset[Any], size: Sequence[int], stride: Sequence[int]) -> None:
        if count_of(dataset) == 0:
            raise UserError("there are no samples to cut windows from")
        x: Tensor = dataset[0][0]
        if len(size) > x.ndim:
            raise ValueError(f"size={list(size)} has more dimensions than samples of {_shape(x)}")
        self.dataset, self.shape = dataset, x.shape
        self.spatial = x.shape[x.ndim - len(size) :]
        self.places = _places(self.spatial, size, stride)

    def __len__(self) -> int:
        return count_of(self.dataset) * len(self.places)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        """A window of shape (*leading, *size), and its target."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        sample, number = divmod(index, len(self.places))
        x, target = self.dataset[sample]
        if x.shape != self.shape:
            raise UserError(f"sample {sample} has {_shape(x)}, sample 0 has {list(self.shape)}")
        place = self.places[number]
        return x[place], target[place] if self._is_map(target) else target

    def _is_map(self, target: Any) -> bool:
        dimensions = len(self.spatial)
        return (
            isinstance(target, Tensor)
            and target.ndim >= dimensions
            and target.shape[target.ndim - dimensions :] == self.spatial
        )


class PatchInference:
    """Predicts large inputs window by window; where windows overlap, the mean of the outputs.

    Args:
        size: Of a window, a number for each spatial dimension.
        overlap: The share of a window that it has in common with the next; from 0 to below 1.
        batch_size: Windows that the model gets at once.

    Raises:
        ValueError: A number is outside of what is allowed.
    """

    def __init__(self, size: Sequence[int], overlap: float = 0.25, batch_size: int = 8) -> None:
        if not size or min(size) < 1:
            raise ValueError(f"size={list(size)} must have numbers of at least 1")
        if not 0 <= overlap < 1:
            raise ValueError(f"overlap={overlap} must be at least 0 and below 1")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self.size, self.overlap, self.batch_size = tuple(size), overlap, batch_size

    def __call__(self, model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The model's output for the whole input.

        Args:
            model: From (B, C, *size) to floats of shape (B, K, *size).
            x: Of shape (N, C, *spatial); with zeros around it where it is smaller than a window.

        Returns:
            Of shape (N, K, *spatial), of the type of the model's output.

        Raises:
            ValueError: The input has other dimensions, or the output is not of the windows' size.
        """
        if x.ndim != len(self.size) + 2 or not len(x):
            raise ValueError(
                f"size={list(self.size)} needs inputs of shape (N, C) and {len(self.size)} more "
                f"dimensions, not {_shape(x)}"
            )
        padded, inner = self._pad(x)
        outputs = self._predict(model, padded)
        return outputs[inner]

    def _pad(self, x: Tensor) -> tuple[Tensor, Place]:
        """The input, at least as large as a window, and where the original is in it."""
        missing = [max(0, size - n) for size, n in zip(self.size, x.shape[2:], strict=True)]
        ends = zip(missing, x.shape[2:], strict=True)
        inner: Place = (..., *(slice(m // 2, m // 2 + n) for m, n in ends))
        sides = [side for m in reversed(missing) for side in (m // 2, m - m // 2)]
        return F.pad(x, sides), inner

    def _predict(self, model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        places = _places(x.shape[2:], self.size, self._stride)
        windows = list(itertools.product(range(len(x)), places))
        total: Tensor | None = None
        for start in range(0, len(windows), self.batch_size):
            batch = windows[start : start + self.batch_size]
            outputs = model(torch.stack([x[sample][place] for sample, place in batch]))
            self._check(outputs, len(batch))
            if total is None:
                total = _zeros(outputs, [len(x), outputs.shape[1], *x.shape[2:]])
            for (sample, place), output in zip(batch, outputs, strict=True):
                total[sample][place] += output
        assert total is not None
        return (total / _coverage(total, x.shape[2:], places)).to(outputs.dtype)

    @property
    def _stride(self) -> list[int]:
        # Rounded first: 20 * (1 - 0.9) is 1.9999999999999996.
        return [max(1, int(round(size * (1 - self.overlap), 6))) for size in self.size]

    def _check(self, outputs: Tensor, count: int) -> None:
        shape = tuple(outputs.shape)
        if len(shape) != len(self.size) + 2 or (shape[0], shape[2:]) != (count, self.size):
            raise ValueError(
                f"{count} windows of size {list(self.size)} became an output of {_shape(outputs)}; "
                f"allowed: ({count}, K, {', '.join(map(str, self.size))})"
            )
        if not outputs.is_floating_point():
            raise ValueError(f"outputs of {outputs.dtype} cannot be averaged; allowed: floats")


def _places(shape: Sequence[int], size: Sequence[int], stride: Sequence[int]) -> list[Place]:
    if not len(shape) == len(size) == len(stride) > 0:
        raise ValueError(
            f"size={list(size)} and stride={list(stride)} must have a number for each of the "
            f"{len(shape)} dimensions of {list(shape)}"
        )
    for whole, window, step in zip(shape, size, stride, strict=True):
        if not 1 <= window <= whole:
            raise ValueError(f"size={list(size)} must be between 1 and the shape {list(shape)}")
        if not 1 <= step <= window:
            raise ValueError(f"stride={list(stride)} must be between 1 and the size {list(size)}")
    lines = [
        [slice(start, start + window) for start in _starts(whole, window, step)]
        for whole, window, step in zip(shape, size, stride, strict=True)
    ]
    return [(..., *slices) for slices in itertools.product(*lines)]


def _starts(whole: int, window: int, step: int) -> list[int]:
    last = whole - window
    return [*range(0, last, step), last]


def _coverage(total: Tensor, shape: Sequence[int], places: list[Place]) -> Tensor:
    """How many windows lie over each place, of that shape, in the type of `total`."""
    counts = total.new_zeros(*shape)
    for place in places:
        counts[place] += 1
    return counts


def _zeros(like: Tensor, shape: Sequence[int]) -> Tensor:
    # Sums of many half-precision values would lose what they add.
    return like.new_zeros(*shape, dtype=torch.promote_types(like.dtype, torch.float32))


def _shape(x: Tensor) -> str:
    return f"shape {list(x.shape)}"
