"""How many predictions are right."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


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
