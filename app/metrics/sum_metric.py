"""A metric whose states are sums, so that those of steps can be added up."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_sum

Sums = tuple[Tensor, ...]
MAX_STATE_SIZE = 512  # numbers in the states of a metric that is evaluated at every step
METRIC_ERRORS = (  # that a metric raises for outputs or targets that it does not support
    RuntimeError,
    ValueError,
    TypeError,
    IndexError,
    AttributeError,
    AssertionError,
)


class SumMetric:
    """A metric whose states are sums, so that those of steps can be added up.

    A step returns the states after one update from zero. The value is computed from the states of
    one step, or from their sum over a stage.

    Args:
        metric: Metric on the training device.
    """

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.defaults = {
            n: z.to(metric.device) for n, z in metric._defaults.items() if isinstance(z, Tensor)
        }
        self.cpu_metric = copy.deepcopy(metric).cpu().set_dtype(torch.float64)
        zeros = tuple(zero.cpu() for zero in self.defaults.values())
        value = self._compute(zeros)
        self.has_integer_value, self.is_scalar = not value.is_floating_point(), value.numel() == 1
        # Counts only: float sums could depend on how many steps are updated at once.
        self.is_vectorized = not any(z.is_floating_point() for z in self.defaults.values())
        self.is_elementwise = all(z.numel() == 1 for z in self.defaults.values())

    def sums(self, outputs: Tensor, targets: Tensor) -> Sums:
        """Return the states after this batch alone, without synchronizing with the device."""
        return self._update(self.zeros(), outputs, targets)

    def block_sums(self, outputs: Tensor, targets: Tensor) -> Sums:
        """Return the states after each of several batches alone, of shape (steps, ...).

        Args:
            outputs: Outputs of each step, of shape (steps, N, ...).
            targets: Targets of each step, of shape (steps, N, ...).
        """
        if self.is_vectorized:
            try:
                return self._vectorized_update(outputs, targets)
            except (*METRIC_ERRORS, UserWarning):  # such as control flow that depends on data
                self.is_vectorized = False
        steps = [self.sums(*batch) for batch in zip(outputs, targets, strict=True)]
        return tuple(map(torch.stack, zip(*steps, strict=True)))

    def _vectorized_update(self, outputs: Tensor, targets: Tensor) -> Sums:
        num_steps = len(outputs)
        states = tuple(z.new_zeros(num_steps, *z.shape) for z in self.defaults.values())
        try:
            with _refusing_slow_vmap():
                sums: Sums = torch.vmap(self._update)(states, outputs, targets)
        finally:  # the states must not refer to tensors of vmap
            vars(self.metric).update(self.defaults)
        return sums

    def _update(self, states: Sums, outputs: Tensor, targets: Tensor) -> Sums:
        """Return the states after one update from these ones."""
        # Bypass Module.__setattr__ and torchmetrics' wrapper of update, which are slow.
        vars(self.metric).update(zip(self.defaults, states, strict=True))
        type(self.metric).update(self.metric, outputs, targets)
        return tuple(getattr(self.metric, name) for name in self.defaults)

    def zeros(self) -> Sums:
        """Return the states of a step without samples."""
        return tuple(torch.zeros_like(zero) for zero in self.defaults.values())

    def value(self, sums: Tensor) -> np.ndarray:
        """Return the value of the metric.

        Args:
            sums: Concatenated states, a float64 vector on the CPU. Counts are divided in float64,
                so that 9 of 10 are exactly 0.9 and not the nearest float32.
        """
        return self._compute(tuple(part[0] for part in self._split_states(sums[None]))).numpy()

    def values(self, rows: Tensor) -> np.ndarray:
        """Return the values of a scalar metric, for each row of a matrix of concatenated states.

        NaN marks the rows without a value.
        """
        if self.is_elementwise:
            try:
                return self._vectorized_values(rows)
            except (*METRIC_ERRORS, UserWarning):  # such as control flow that depends on data
                self.is_elementwise = False
        values = np.full(len(rows), np.nan)
        for index, states in enumerate(zip(*self._split_states(rows), strict=True)):
            with suppress(ValueError, RuntimeError):  # too few samples, such as R2 of a single one
                values[index] = self._compute(states).item()
        is_integer = self.has_integer_value and not np.isnan(values).any()
        return values.astype(np.int64) if is_integer else values

    def _vectorized_values(self, rows: Tensor) -> np.ndarray:
        try:
            with _refusing_slow_vmap():
                values: Tensor = torch.vmap(self._compute)(self._split_states(rows))
        finally:
            vars(self.cpu_metric).update({n: zero.cpu() for n, zero in self.defaults.items()})
        return values.reshape(len(rows)).numpy()

    def _split_states(self, rows: Tensor) -> Sums:
        """Return the states of each row, of shape (rows, ...) each."""
        sizes = [zero.numel() for zero in self.defaults.values()]
        parts = zip(self.defaults.values(), rows.split(sizes, dim=1), strict=True)
        return tuple(
            (part.to(zero.dtype) if self.has_integer_value else part).reshape(-1, *zero.shape)
            for zero, part in parts
        )

    def _compute(self, states: tuple[Tensor, ...]) -> Tensor:
        vars(self.cpu_metric).update(zip(self.defaults, states, strict=True))
        value: Tensor = type(self.cpu_metric).compute(self.cpu_metric)
        return value


@contextmanager
def _refusing_slow_vmap() -> Iterator[None]:
    """Raise a warning as an error: that vmap runs an operation once for each step."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "There is a performance drop")
        yield


def has_small_sum_states(metric: Metric) -> bool:
    """Whether all states are tensors that are summed over ranks and have few elements in total."""
    states = metric._defaults.values()
    return (
        all(isinstance(state, Tensor) for state in states)
        and all(reduction is dim_zero_sum for reduction in metric._reductions.values())
        and 0
        < sum(state.numel() for state in states if isinstance(state, Tensor))
        <= MAX_STATE_SIZE
        and _computes_tensor(metric)
    )


def _computes_tensor(metric: Metric) -> bool:
    """Whether the value is a single tensor, even without any samples."""
    copied = copy.deepcopy(metric).cpu()
    try:
        return isinstance(type(copied).compute(copied), Tensor)
    except (*METRIC_ERRORS, ArithmeticError):
        return False
