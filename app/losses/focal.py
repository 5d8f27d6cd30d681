"""Focal losses: cross-entropies that down-weight well-classified examples."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FocalLoss(nn.Module):
    """Multi-class focal loss: mean of `-alpha_t * (1 - p_t)^gamma * log(p_t)`, `p_t` by softmax.

    Equation 5 of Lin et al., "Focal Loss for Dense Object Detection", 2017
    (https://arxiv.org/abs/1708.02002). The mean is over the positions that are not ignored, without
    normalization by alpha; it is 0 if all are ignored.

    Args:
        gamma: Focusing parameter, at least 0; 0 gives the cross-entropy.
        alpha: Weight of each class, at least 0; None weights all classes equally.
        ignore_index: Label of positions to ignore.
    """

    alpha: Tensor | None

    def __init__(
        self, gamma: float = 2.0, alpha: list[float] | None = None, ignore_index: int = -100
    ) -> None:
        super().__init__()
        _check_gamma(gamma)
        if alpha is not None and not (alpha and all(0 <= value < math.inf for value in alpha)):
            raise ValueError(f"alpha={alpha} must have a finite value of at least 0 per class")
        self.gamma, self.ignore_index = gamma, ignore_index
        weights = None if alpha is None else torch.tensor(alpha, dtype=torch.float32)
        self.register_buffer("alpha", weights, persistent=False)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the loss, computed in float32 or wider.

        Args:
            output: Logits of shape (N, C, ...).
            target: Integer labels of shape (N, ...).

        Raises:
            ValueError: The shapes or the number of alphas do not match, or the target is not of an
                integer type.
        """
        self._check(output, target)
        labels = target.long()
        mask = labels != self.ignore_index
        labels = labels.masked_fill(~mask, 0)
        dtype = torch.promote_types(output.dtype, torch.float32)
        log_p = output.log_softmax(dim=1, dtype=dtype).gather(1, labels.unsqueeze(1)).squeeze(1)
        losses = -_power(-torch.expm1(log_p), self.gamma) * log_p
        if self.alpha is not None:
            losses = self.alpha.to(dtype)[labels] * losses
        return losses.where(mask, 0).sum() / mask.sum().clamp(min=1)

    def normalizer(self, target: Tensor) -> Tensor | None:
        """Return the number of positions that the mean is over; None if that of the samples."""
        if target.ndim < 2 and self.ignore_index < 0:
            return None
        return (target != self.ignore_index).sum()

    def _check(self, output: Tensor, target: Tensor) -> None:
        expected, num_classes = output[:, 0].shape, output.shape[1]
        if target.shape != expected or target.is_floating_point():
            raise ValueError(
                f"target is {target.dtype} of shape {list(target.shape)}; for outputs of shape "
                f"{list(output.shape)} it must be integer labels of shape {list(expected)}"
            )
        if self.alpha is not None and len(self.alpha) != num_classes:
            raise ValueError(
                f"alpha has {len(self.alpha)} values, but there are {num_classes} classes"
            )


class BinaryFocalLoss(nn.Module):
    """Binary focal loss: mean of `-alpha_t * (1 - p_t)^gamma * log(p_t)`, `p_t` by sigmoid.

    Equation 5 of Lin et al., "Focal Loss for Dense Object Detection", 2017
    (https://arxiv.org/abs/1708.02002).

    Args:
        gamma: Focusing parameter, at least 0; 0 gives the binary cross-entropy.
        alpha: Weight of the positives, in [0, 1]; negatives have weight `1 - alpha`. None weights
            both by 1.
    """

    def __init__(self, gamma: float = 2.0, alpha: float | None = None) -> None:
        super().__init__()
        _check_gamma(gamma)
        if alpha is not None and not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha} must be between 0 and 1")
        self.gamma, self.alpha = gamma, alpha

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the loss, computed in float32 or wider.

        Args:
            output: Logits of any shape.
            target: Probabilities of the same shape.

        Raises:
            ValueError: The shapes differ.
        """
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        target = target.to(output.dtype)
        losses = F.binary_cross_entropy_with_logits(output, target, reduction="none")
        one_minus_p = output.sigmoid() * (1 - target) + (-output).sigmoid() * target
        losses = _power(one_minus_p, self.gamma) * losses
        if self.alpha is not None:
            losses = (self.alpha * target + (1 - self.alpha) * (1 - target)) * losses
        return losses.mean()


def _check_gamma(gamma: float) -> None:
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma={gamma} must be at least 0 and finite")


def _power(one_minus_p: Tensor, gamma: float) -> Tensor:
    # For gamma < 1 the slope at 0 is infinite, and its product with a loss of 0 would be NaN.
    return one_minus_p.clamp(min=torch.finfo(one_minus_p.dtype).tiny) ** gamma
