"""Values of a step that stay on the device, and their way to the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from app.distributed.collectives import all_reduce
from app.metrics.update_block import MetricSums, stack_sums, zeros_like_sums
from app.runtime.host_copy import HostCopy


@dataclass(frozen=True)
class Average:
    """Mean over the samples of a step; make it with `average(value, count)`.

    Attributes:
        value: Scalar tensor on the device, detached.
        count: Number of samples; 0 if the step does not count.
        weight: How much the value counts in a mean over steps, a scalar on the device; None is the
            number of samples.
    """

    value: Tensor
    count: int
    weight: Tensor | None = None


StepValues = Mapping[str, Average | MetricSums]


def average(value: Tensor, count: int, weight: Tensor | None = None) -> Average:
    """Return a scalar tensor as the mean over `count` samples; detached, but not read.

    Args:
        value: The mean.
        count: Number of samples.
        weight: See `Average`.
    """
    return Average(value.detach(), count, weight)


def zeros_like_row(values: StepValues) -> StepValues:
    """Return the same columns with values that count for nothing."""
    return {
        name: Average(
            torch.zeros_like(value.value), 0, None if value.weight is None else 0 * value.weight
        )
        if isinstance(value, Average)
        else zeros_like_sums(value)
        for name, value in values.items()
    }


class StepBlock:
    """Values of several steps: stacked, reduced over ranks, and on their way to the host.

    Making one blocks nothing on a CUDA device; all ranks must make it.

    Args:
        rows: Values of each step, all with the same columns.
    """

    def __init__(self, rows: Sequence[StepValues]) -> None:
        columns = {name: _stack_column([row[name] for row in rows]) for name in rows[0]}
        self.widths = {name: column.shape[1] for name, column in columns.items()}
        self.copy = HostCopy(all_reduce(torch.cat(list(columns.values()), dim=1)))

    @property
    def is_ready(self) -> bool:
        """Whether the values can be had without waiting for the device."""
        return self.copy.is_ready

    def get(self) -> dict[str, Tensor]:
        """Return the values, after waiting for them if necessary.

        Returns:
            By column name, a float64 matrix with one row per step. Its columns are the weighted
            value, the weight (if it is not the count) and the count of an `Average`, or all states
            of a metric.
        """
        parts = self.copy.get().double().split(list(self.widths.values()), dim=1)
        return dict(zip(self.widths, parts, strict=True))


def means(sums: Tensor) -> Tensor:
    """Return the means of columns of `Average`s; NaN without samples, 0 if all weights are 0."""
    value, weight, count = sums[..., 0], sums[..., 1], sums[..., -1]
    return value / weight.masked_fill((weight == 0) & (count > 0), 1.0)


def _stack_column(values: Sequence[Average | MetricSums]) -> Tensor:
    averages = [value for value in values if isinstance(value, Average)]
    if averages:
        mean = _to_float64(torch.stack([item.value for item in averages]))
        counts = _to_device([item.count for item in averages], mean)
        weights = [item.weight for item in averages if item.weight is not None]
        if not weights:
            return torch.stack([mean * counts, counts], dim=1)
        weight = _to_float64(torch.stack(weights))
        return torch.stack([mean * weight, weight, counts], dim=1)
    states = stack_sums([value for value in values if not isinstance(value, Average)])
    return torch.cat([_to_float64(state).reshape(len(values), -1) for state in states], dim=1)


def _to_device(numbers: list[int], like: Tensor) -> Tensor:
    """Return numbers as a tensor with the type and device of another one."""
    # Only a copy from pinned memory does not wait for a CUDA device.
    host = torch.tensor(numbers, dtype=like.dtype, pin_memory=like.is_cuda)
    return host.to(like.device, non_blocking=True)


def _to_float64(values: Tensor) -> Tensor:
    """Convert to float64, which sums counts and float32 values exactly; MPS only has float32."""
    return values.float() if values.device.type == "mps" else values.double()
