"""Cross-entropies that look away from what is already predicted well."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FocalLoss(nn.Module):
    """Focal loss over classes: the mean of -alpha_t * (1 - p_t)^gamma * log(p_t), p_t by softmax.

    Equation 5 of Lin et al. 2017, "Focal Loss for Dense Object Detection"
    (https://arxiv.org/abs/1708.02002). The mean is over the positions that are not ignored, not
    divided by their alphas; 0 where all are ignored.

    Args:
        gamma: At least 0; how far it looks away. 0 is the cross-entropy.
        alpha: A factor of at least 0 for each class; None where all weigh the same.
        ignore_index: The label of positions that do not count.

    Raises:
        ValueError: An argument is out of its range.
    """

    alpha: Tensor | None

    def __init__(
        self, gamma: float = 2.0, alpha: list[float] | None = None, ignore_index: int = -100
    ) -> None:
        super().__init__()
        _check_gamma(gamma)
        if alpha is not None and not (alpha and all(0 <= value < math.inf for value in alpha)):
            raise ValueError(f"alpha={alpha} must hold a finite number of at least 0 per class")
        self.gamma, self.ignore_index = gamma, ignore_index
        weights = None if alpha is None else torch.tensor(alpha, dtype=torch.float32)
        self.register_buffer("alpha", weights, persistent=False)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss, computed in float32 at least.

        Args:
            output: Logits of shape (N, C, ...).
            target: Whole-numbered labels of shape (N, ...).

        Raises:
            ValueError: The shapes do not fit each other or alpha, or the target holds no labels.
        """
        self._check(output, target)
        labels = target.long()
        counts = labels != self.ignore_index
        labels = labels.masked_fill(~counts, 0)
        dtype = torch.promote_types(output.dtype, torch.float32)
        logs = output.log_softmax(dim=1, dtype=dtype).gather(1, labels.unsqueeze(1)).squeeze(1)
        losses = -_power(-torch.expm1(logs), self.gamma) * logs
        if self.alpha is not None:
            losses = self.alpha.to(dtype)[labels] * losses
        return losses.where(counts, 0).sum() / counts.sum().clamp(min=1)

    def _check(self, output: Tensor, target: Tensor) -> None:
        expected, classes = output[:, 0].shape, output.shape[1]
        if target.shape != expected or target.is_floating_point():
            raise ValueError(
                f"target is {target.dtype} of shape {list(target.shape)}; for outputs of shape "
                f"{list(output.shape)} it must hold whole-numbered labels of shape {list(expected)}"
            )
        if self.alpha is not None and len(self.alpha) != classes:
            raise ValueError(f"alpha has {len(self.alpha)} values, but there are {classes} classes")


class BinaryFocalLoss(nn.Module):
    """Focal loss of yes-or-no outputs: the mean of -alpha_t * (1 - p_t)^gamma * log(p_t).

    Equation 5 of Lin et al. 2017, "Focal Loss for Dense Object Detection"
    (https://arxiv.org/abs/1708.02002).

    Args:
        gamma: At least 0; how far it looks away. 0 is the binary cross-entropy.
        alpha: From 0 to 1, the weight of the positives, the negatives having the rest; None where
            both weigh 1.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(self, gamma: float = 2.0, alpha: float | None = None) -> None:
        super().__init__()
        _check_gamma(gamma)
        if alpha is not None and not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha} must be between 0 and 1")
        self.gamma, self.alpha = gamma, alpha

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss, computed in float32 at least.

        Args:
            output: Logits of any shape.
            target: Of the same shape, from 0 to 1.

        Raises:
            ValueError: The shapes differ.
        """
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        target = target.to(output.dtype)
        losses = F.binary_cross_entropy_with_logits(output, target, reduction="none")
        missed = output.sigmoid() * (1 - target) + (-output).sigmoid() * target
        losses = _power(missed, self.gamma) * losses
        if self.alpha is not None:
            losses = (self.alpha * target + (1 - self.alpha) * (1 - target)) * losses
        return losses.mean()


def _check_gamma(gamma: float) -> None:
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma={gamma} must be at least 0 and finite")


def _power(missed: Tensor, gamma: float) -> Tensor:
    # at 0 the slope of a power below 1 is infinite, and infinity times a loss of 0 is no number
    return missed.clamp(min=torch.finfo(missed.dtype).tiny) ** gamma
