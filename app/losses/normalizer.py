"""What a loss divides by to get its mean, where that is not the number of samples.

A cross-entropy with class weights divides by the sum of the weights of its targets, and one with
ignored positions by the number of the others. Batches and shares of a batch must count by these
sums, so that the mean over several ranks, accumulated batches and an epoch is exact.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch.nn.functional as F
from torch import Tensor, nn


@runtime_checkable
class HasNormalizer(Protocol):
    """A loss function of your own that divides by something else than the number of samples."""

    def normalizer(self, target: Tensor) -> Tensor | None:
        """Return the sum that the mean divides by, a scalar; None: the number of samples."""


def normalizer(function: object, target: Tensor) -> Tensor | None:
    """Return the scalar that the mean of a loss function divides by; None: the number of samples.

    Args:
        function: `torch.nn.CrossEntropyLoss`, `torch.nn.NLLLoss`, or a loss with a method
            `normalizer`; all others divide by the number of samples.
        target: Targets of a batch.
    """
    if not isinstance(function, (nn.CrossEntropyLoss, nn.NLLLoss)):
        return function.normalizer(target) if isinstance(function, HasNormalizer) else None
    if function.reduction != "mean" or target.is_floating_point():  # probabilities: of N samples
        return None
    if function.weight is None and function.ignore_index < 0 and target.ndim < 2:
        return None
    mask = target != function.ignore_index
    if function.weight is None:
        return mask.sum()
    labels = target.masked_fill(~mask, 0)
    return (function.weight[labels] * mask).sum()


def normalized_loss(
    function: nn.CrossEntropyLoss | nn.NLLLoss, output: Tensor, target: Tensor, divisor: Tensor
) -> Tensor:
    """Return the mean of a cross-entropy, which is 0 instead of NaN if all positions are ignored.

    Args:
        function: Loss function.
        output: As the function takes it.
        target: As the function takes it.
        divisor: Its `normalizer`.
    """
    weight, ignore_index = function.weight, function.ignore_index
    if isinstance(function, nn.CrossEntropyLoss):
        smoothing = function.label_smoothing
        total = F.cross_entropy(output, target, weight, None, ignore_index, None, "sum", smoothing)
    else:
        total = F.nll_loss(output, target, weight, None, ignore_index, None, "sum")
    return total / divisor.where(divisor > 0, 1)
