"""Metrics from plain functions, and the count of correct predictions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics import Metric


class SampleMean(Metric):
    """Base of metrics that are a mean over samples; `update` adds to `total` and `count`."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        return self.total / self.count


class FunctionMetric(SampleMean):
    """Mean of a function over all samples.

    Args:
        function: Maps output and target of a batch of N samples to their mean, a scalar, or to one
            value per sample, of shape (N,).
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        if not callable(function):
            raise ValueError(f"function={function!r} is not callable; set _partial_: true")
        self.function = function

    def update(self, output: Tensor, target: Tensor) -> None:
        """Add a batch, of any form that the function accepts; `target` has shape (N, ...)."""
        n = target.shape[0]
        value = torch.as_tensor(self.function(output, target))
        shape = tuple(value.shape)
        if shape not in ((), (n,)):
            raise ValueError(
                f"the function returned a tensor of shape {shape}; "
                f"allowed: a scalar, the mean over the batch, or one value per sample, ({n},)"
            )
        values = value.to(self.total.dtype)
        self.total += values.sum() if shape else values * n
        self.count += n


class CorrectPredictions(Metric):
    """Number of samples whose highest output is that of their label."""

    higher_is_better = True
    full_state_update = False
    correct: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("correct", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add outputs of shape (N, classes, ...) and labels of shape (N, ...)."""
        self.correct += (preds.argmax(dim=1) == target).sum()

    def compute(self) -> Tensor:
        return self.correct
