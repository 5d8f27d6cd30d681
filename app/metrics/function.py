"""Metrics from plain functions, cosine similarity, and the count of correct predictions."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
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


class CosineSimilarity(SampleMean):
    """Mean cosine of the angle between output and target, each sample taken as one vector."""

    higher_is_better = True

    def update(self, output: Tensor, target: Tensor) -> None:
        """Add outputs and targets of the same shape (N, ...): vectors, images or anything else."""
        if output.shape != target.shape or output.ndim < 2:
            raise ValueError(
                f"cosine similarity needs outputs and targets of the same shape (N, ...); got "
                f"{list(output.shape)} and {list(target.shape)}"
            )
        values = F.cosine_similarity(output.flatten(1), target.flatten(1), dim=1)
        self.total += values.sum().to(self.total.dtype)
        self.count += len(values)


class CorrectPredictions(Metric):
    """Number of samples, or pixels, whose predicted label is the true one."""

    higher_is_better = True
    full_state_update = False
    correct: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("correct", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add outputs of shape (N, classes, ...) and labels of shape (N, ...).

        The labels of a single output may also have its shape, (N, 1, ...).
        """
        labels = predicted_labels(preds)
        target = target.reshape(labels.shape) if preds.shape[1] == 1 else target
        self.correct += (labels == target).sum()

    def compute(self) -> Tensor:
        return self.correct


def predicted_labels(logits: Tensor) -> Tensor:
    """Return the predicted labels (N, ...) of logits (N, C, ...).

    This is the class of the highest logit; for C = 1, whose logits are those of a sigmoid, it is 1
    where they are above 0, and 0 elsewhere.
    """
    return logits.argmax(dim=1) if logits.shape[1] > 1 else (logits[:, 0] > 0).long()
