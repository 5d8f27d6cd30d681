"""Dice losses for segmentation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.runtime.rank_sums import share_of_mean, sum_over_step


class DiceLoss(nn.Module):
    """Soft Dice loss: mean over classes of `1 - (2 * overlap + smooth) / (areas + smooth)`.

    From Milletari et al., "V-Net", 2016 (https://arxiv.org/abs/1606.04797), except that the areas
    are sums of the predicted and the true probabilities instead of their squares.

    Args:
        smooth: Smoothing term, above 0, which gives a loss of 0 instead of 0 / 0 to a class that is
            neither present nor predicted.
        include_background: Whether to include class 0. Ignored for a single output channel.
        ignore_index: Label of positions to ignore; None to use all positions.
        per_sample: Whether to compute the overlap of each sample instead of that of the batch, over
            all ranks and accumulated batches.
    """

    def __init__(
        self,
        smooth: float = 1e-5,
        include_background: bool = True,
        ignore_index: int | None = None,
        per_sample: bool = True,
    ) -> None:
        super().__init__()
        if not 0 < smooth < math.inf:
            raise ValueError(f"smooth={smooth} must be above 0 and finite")
        self.smooth, self.include_background = smooth, include_background
        self.ignore_index, self.per_sample = ignore_index, per_sample

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the loss, computed in float32 or wider.

        Args:
            output: Logits of shape (N, C, ...): of a softmax, or of a sigmoid if C is 1.
            target: Integer labels of shape (N, ...), 0 or 1 if C is 1, or floating-point
                probabilities of shape (N, C, ...), for which `ignore_index` has no effect.

        Raises:
            ValueError: The shapes do not match.
        """
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        truth, mask = _target_map(output, target, self.ignore_index)
        probabilities = output.sigmoid() if output.shape[1] == 1 else output.softmax(dim=1)
        if self.ignore_index is not None:
            probabilities = probabilities * mask
        overlap, predicted, true = (
            self._sum_over_space(values) for values in (probabilities * truth, probabilities, truth)
        )
        return (1 - (2 * overlap + self.smooth) / (predicted + true + self.smooth)).mean()

    def _sum_over_space(self, values: Tensor) -> Tensor:
        if not self.include_background and values.shape[1] > 1:
            values = values[:, 1:]
        sums = values.reshape(*values.shape[:2], -1).sum(dim=-1)
        return sums if self.per_sample else sum_over_step(sums.sum(dim=0))


class DiceCrossEntropyLoss(nn.Module):
    """Weighted sum of the soft Dice loss and the cross-entropy (binary for one output channel).

    From Isensee et al., "nnU-Net", 2021 (https://doi.org/10.1038/s41592-020-01008-z). The Dice loss
    is computed per sample. The cross-entropy is the mean over the positions that are not ignored,
    of all ranks, or 0 if all are ignored; it always includes the background.

    Args:
        dice_weight: Weight of the Dice loss, at least 0.
        cross_entropy_weight: Weight of the cross-entropy, at least 0.
        smooth: See `DiceLoss`.
        include_background: See `DiceLoss`; does not affect the cross-entropy.
        ignore_index: See `DiceLoss`.
    """

    def __init__(
        self,
        dice_weight: float = 1.0,
        cross_entropy_weight: float = 1.0,
        smooth: float = 1e-5,
        include_background: bool = True,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        weights = {"dice_weight": dice_weight, "cross_entropy_weight": cross_entropy_weight}
        for name, weight in weights.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name}={weight} must be at least 0 and finite")
        self.dice_weight, self.cross_entropy_weight = dice_weight, cross_entropy_weight
        self.dice = DiceLoss(smooth, include_background, ignore_index)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the loss; see `DiceLoss.forward` for shapes, dtypes and errors."""
        dice: Tensor = self.dice_weight * self.dice(output, target)
        return dice + self.cross_entropy_weight * self._cross_entropy(output, target)

    def _cross_entropy(self, output: Tensor, target: Tensor) -> Tensor:
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        truth, mask = _target_map(output, target, self.dice.ignore_index)
        if output.shape[1] == 1:
            losses = F.binary_cross_entropy_with_logits(output, truth, reduction="none") * mask
        else:
            losses = -truth * output.log_softmax(dim=1)
        mean = losses.sum() / mask.sum().clamp(min=1)
        ignores = self.dice.ignore_index is not None
        return share_of_mean(mean, mask.sum(), len(output)) if ignores else mean


def _target_map(output: Tensor, target: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """Return the true probabilities (N, C, ...) and the mask of positions to use (N, 1, ...).

    The probabilities of all classes are 0 at ignored positions.
    """
    is_labels = not target.is_floating_point()
    expected = output[:, 0].shape if is_labels else output.shape
    if target.shape != expected:
        raise ValueError(
            f"target has shape {list(target.shape)}; for outputs of shape {list(output.shape)} it "
            f"must be {list(expected)}, as {'labels' if is_labels else 'probabilities'}"
        )
    if is_labels:
        return _one_hot(output, target.long().unsqueeze(1), ignore_index)
    return target.to(output.dtype), torch.ones_like(output[:, :1], dtype=torch.bool)


def _one_hot(output: Tensor, labels: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    mask = torch.ones_like(labels, dtype=torch.bool)
    if ignore_index is not None:
        mask = labels != ignore_index
        labels = labels.masked_fill(~mask, 0)
    if output.shape[1] == 1:
        return labels.to(output.dtype), mask
    return torch.zeros_like(output).scatter_(1, labels, mask.to(output.dtype)), mask
