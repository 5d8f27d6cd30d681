"""How little the predicted regions overlap the true ones."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DiceLoss(nn.Module):
    """Soft Dice loss: the mean over classes of 1 - (2 overlap + smooth) / (sizes + smooth).

    From Milletari et al. 2016, "V-Net" (https://arxiv.org/abs/1606.04797); sizes are the sums of
    the predicted and of the true probabilities, not of their squares as there.

    Args:
        smooth: Above 0, so that a class that is neither true nor predicted costs 0, not 0 / 0.
        include_background: Whether class 0 counts. A single output has no background.
        ignore_index: The label of positions that count neither way; None where all count.
        per_sample: Whether overlaps are those of each sample, else those of the whole batch.

    Raises:
        ValueError: An argument is out of its range.
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
        """The loss, computed in float32 at least.

        Args:
            output: Logits of shape (N, C, ...): of a softmax, or of a sigmoid where C is 1.
            target: Whole-numbered labels of shape (N, ...), 0 or 1 where C is 1; or a floating map
                of probabilities of shape (N, C, ...), where nothing is ignored.

        Raises:
            ValueError: The shapes do not fit, or there is no class but the background.
        """
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        truth, counts = _truth(output, target, self.ignore_index)
        probabilities = output.sigmoid() if output.shape[1] == 1 else output.softmax(dim=1)
        if self.ignore_index is not None:
            probabilities = probabilities * counts
        overlap, predicted, true = (
            self._sums(values) for values in (probabilities * truth, probabilities, truth)
        )
        return (1 - (2 * overlap + self.smooth) / (predicted + true + self.smooth)).mean()

    def _sums(self, values: Tensor) -> Tensor:
        if not self.include_background and values.shape[1] > 1:
            values = values[:, 1:]
        sums = values.reshape(*values.shape[:2], -1).sum(dim=-1)
        return sums if self.per_sample else sums.sum(dim=0)


class DiceCrossEntropyLoss(nn.Module):
    """The weighted sum of the soft Dice loss and the cross-entropy; the binary one where C is 1.

    From Isensee et al. 2021, "nnU-Net" (https://doi.org/10.1038/s41592-020-01008-z). The overlaps
    are those of each sample. The cross-entropy is the mean over the positions that are not
    ignored, 0 where all are; the background always counts in it.

    Args:
        dice_weight: Factor of the Dice loss, at least 0.
        cross_entropy_weight: Factor of the cross-entropy, at least 0.
        smooth: As in `Dice`.
        include_background: As in `Dice`, and for it alone.
        ignore_index: As in `Dice`.

    Raises:
        ValueError: An argument is out of its range.
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
        """The loss; shapes, dtypes and errors are those of `Dice`."""
        dice: Tensor = self.dice_weight * self.dice(output, target)
        return dice + self.cross_entropy_weight * self._cross_entropy(output, target)

    def _cross_entropy(self, output: Tensor, target: Tensor) -> Tensor:
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        truth, counts = _truth(output, target, self.dice.ignore_index)
        if output.shape[1] == 1:
            losses = F.binary_cross_entropy_with_logits(output, truth, reduction="none") * counts
        else:
            losses = -truth * output.log_softmax(dim=1)
        return losses.sum() / counts.sum().clamp(min=1)


def _truth(output: Tensor, target: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """The true map, 0 in all classes where ignored; and what counts, of shape (N, 1, ...)."""
    labels = not target.is_floating_point()
    expected = output[:, 0].shape if labels else output.shape
    if target.shape != expected:
        raise ValueError(
            f"target has shape {list(target.shape)}; for outputs of shape {list(output.shape)} it "
            f"must be {list(expected)}, as {'labels' if labels else 'probabilities'}"
        )
    if labels:
        return _map_of(output, target.long().unsqueeze(1), ignore_index)
    return target.to(output.dtype), torch.ones_like(output[:, :1], dtype=torch.bool)


def _map_of(output: Tensor, labels: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    counts = torch.ones_like(labels, dtype=torch.bool)
    if ignore_index is not None:
        counts = labels != ignore_index
        labels = labels.masked_fill(~counts, 0)
    if output.shape[1] == 1:
        return labels.to(output.dtype), counts
    return torch.zeros_like(output).scatter_(1, labels, counts.to(output.dtype)), counts
