"""Metrics as sums: what one step adds, and what the sums of a stage amount to."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_sum

Sums = tuple[Tensor, ...]
NARROW = 512  # numbers of state up to which a metric is kept step by step


class StepMetric:
    """A metric whose states are sums, so that those of steps can be added up.

    Its states after one update from zero are what a step returns; its value is computed from the
    states of one step, or from their sum over a stage.

    Args:
        metric: On the training device.
    """

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.zeros = {
            n: z.to(metric.device) for n, z in metric._defaults.items() if isinstance(z, Tensor)
        }
        self.on_host = copy.deepcopy(metric).cpu().set_dtype(torch.float64)
        self.is_count: bool | None = None  # whether its value is a whole number, once known

    def sums(self, outputs: Tensor, targets: Tensor) -> Sums:
        """The states after this batch alone, on its device; nothing is read back."""
        # Past the module's __setattr__ and the instance's wrapper of update: both cost time.
        vars(self.metric).update({n: torch.zeros_like(z) for n, z in self.zeros.items()})
        type(self.metric).update(self.metric, outputs, targets)
        return tuple(getattr(self.metric, name) for name in self.zeros)

    def value(self, sums: Tensor) -> np.ndarray:
        """The metric from a host float64 vector of all states, one after the other.

        Counts are divided in float64, so that 9 of 10 are 0.9 and not the nearest float32.
        """
        if self.is_count is None:
            (value,) = self._compute(sums[None], exact=False)
            self.is_count = not value.is_floating_point()
        (value,) = self._compute(sums[None], exact=not self.is_count)
        return value.numpy()

    def values(self, rows: Tensor) -> np.ndarray:
        """The metric, a single number, of each row of a matrix of such vectors."""
        return torch.stack(list(self._compute(rows, exact=not self.is_count))).flatten().numpy()

    def _compute(self, rows: Tensor, exact: bool) -> Iterator[Tensor]:
        sizes = [zero.numel() for zero in self.zeros.values()]
        columns = [
            (part if exact else part.to(zero.dtype)).reshape(-1, *zero.shape).unbind()
            for zero, part in zip(self.zeros.values(), rows.split(sizes, dim=1), strict=True)
        ]
        for states in zip(*columns, strict=True):
            vars(self.on_host).update(zip(self.zeros, states, strict=True))
            yield type(self.on_host).compute(self.on_host)


class StageMetrics:
    """The metrics of one stage.

    Args:
        metrics: By name, on the training device. Those with few states that are sums are kept
            step by step; the others (a curve, a large matrix) accumulate until the stage ends.

    A metric that collects all outputs is updated when the stage ends: many of them read the
    device in their update.
    """

    def __init__(self, metrics: dict[str, Metric]) -> None:
        self.by_step = {n: StepMetric(m) for n, m in metrics.items() if has_narrow_sums(m)}
        self.by_stage = {n: m for n, m in metrics.items() if n not in self.by_step}
        self.collectors = [m for m in self.by_stage.values() if collects(m)]
        self.others = [m for m in self.by_stage.values() if not collects(m)]
        self.collected: list[tuple[Tensor, Tensor]] = []

    def reset(self) -> None:
        """Forgets what has accumulated; a stage begins."""
        self.collected = []
        for metric in self.by_stage.values():
            metric.reset()

    def sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Sums]:
        """What this batch adds to each metric that is kept step by step."""
        for metric in self.others:
            metric.update(outputs, targets)
        if self.collectors:
            self.collected.append((outputs, targets))
        return {name: metric.sums(outputs, targets) for name, metric in self.by_step.items()}

    def accumulated(self) -> dict[str, np.ndarray]:
        """The values of those that accumulated; they agree over ranks here."""
        if self.collected:
            outputs, targets = (torch.cat(parts) for parts in zip(*self.collected, strict=True))
            self.collected = []
            for metric in self.collectors:
                metric.update(outputs, targets)
        return {name: metric.compute().cpu().numpy() for name, metric in self.by_stage.items()}


def collects(metric: Metric) -> bool:
    """Whether it keeps the outputs of every step."""
    return any(isinstance(state, list) for state in metric._defaults.values())


def has_narrow_sums(metric: Metric) -> bool:
    """Whether all of its states are tensors of few numbers that add up."""
    states = metric._defaults.values()
    return (
        all(isinstance(state, Tensor) for state in states)
        and all(reduction is dim_zero_sum for reduction in metric._reductions.values())
        and 0 < sum(state.numel() for state in states if isinstance(state, Tensor)) <= NARROW
    )
