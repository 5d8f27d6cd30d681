"""A plain function as a metric."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics import Metric


class FunctionMetric(Metric):
    """The mean over all samples of what a function gives.

    Args:
        function: From output and target to their mean over the batch, a scalar, or to one value
            for each of its N samples, of shape (N,).
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        if not callable(function):
            raise ValueError(f"function={function!r} cannot be called; give it as _partial_: true")
        self.function = function
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, output: Tensor, target: Tensor) -> None:
        """Whatever the function takes; the first dimension of the target is the batch."""
        n = target.shape[0]
        value = torch.as_tensor(self.function(output, target))
        shape = tuple(value.shape)
        if shape not in ((), (n,)):
            raise ValueError(
                f"the function gives a tensor of shape {shape}; "
                f"allowed: a scalar, the mean over the batch, or one value for each sample, ({n},)"
            )
        sums = value.to(self.total.dtype)
        self.total += sums.sum() if shape else sums * n
        self.count += n

    def compute(self) -> Tensor:
        """A scalar."""
        return self.total / self.count


class CorrectPredictions(Metric):
    """The number of samples whose highest output is that of their label."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    correct: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("correct", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Outputs of shape (N, classes, ...), labels of shape (N, ...)."""
        self.correct += (preds.argmax(dim=1) == target).sum()

    def compute(self) -> Tensor:
        """The number so far."""
        return self.correct
