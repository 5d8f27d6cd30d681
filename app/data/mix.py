"""MixUp and CutMix: training on mixtures of two samples."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from app.data.augment.base import check_integer, check_probability


class MixUpCutMix:
    """Mix each image and its label with the previous one of the batch, by MixUp or CutMix.

    MixUp (Zhang et al. 2018) averages two images; CutMix (Yun et al. 2019) replaces a rectangle of
    one by that of the other. The share of each, from Beta(alpha, alpha), and the rectangle are
    drawn once per batch, as in torchvision, whose transforms do the work. With several ranks, each
    mixes the samples of its own share, with draws of its own.

    Args:
        num_classes: Number of classes.
        mixup_alpha: Parameter of the distribution for MixUp; None does without MixUp.
        cutmix_alpha: Parameter of the distribution for CutMix; None does without CutMix.
        p: Probability that a batch is mixed.
        switch_p: Probability that CutMix is used rather than MixUp, if there are both.
        until_epoch: Epoch, counted from 1, from which on batches are not mixed; None mixes always.
    """

    def __init__(
        self,
        num_classes: int,
        mixup_alpha: float | None = None,
        cutmix_alpha: float | None = None,
        p: float = 1.0,
        switch_p: float = 0.5,
        until_epoch: int | None = None,
    ) -> None:
        self.num_classes = check_integer("num_classes", num_classes, 2)
        self.mixup = _build(v2.MixUp, "mixup_alpha", mixup_alpha, num_classes)
        self.cutmix = _build(v2.CutMix, "cutmix_alpha", cutmix_alpha, num_classes)
        if self.mixup is None and self.cutmix is None:
            raise ValueError(
                "mixup_alpha=None, cutmix_alpha=None are not valid together; allowed: a positive "
                "number for one or both"
            )
        self.p = check_probability("p", p)
        self.switch_p = check_probability("switch_p", switch_p)
        if until_epoch is not None:
            check_integer("until_epoch", until_epoch, 1)
        self.until_epoch, self.epoch = until_epoch, 1

    def set_epoch(self, epoch: int) -> None:
        """Set the current epoch, counted from 1."""
        self.epoch = epoch

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mix a batch.

        Args:
            images: Shape (N, C, H, W).
            labels: Class indices of shape (N,), or probabilities of shape (N, num_classes).

        Returns:
            The images, and probabilities of shape (N, num_classes), also if nothing is mixed.
        """
        is_over = self.until_epoch is not None and self.epoch >= self.until_epoch
        if is_over or torch.rand(()) >= self.p:
            is_index = labels.ndim == 1
            return images, F.one_hot(labels, self.num_classes).float() if is_index else labels
        mixed: tuple[Tensor, Tensor] = self._choose()(images, labels)
        return mixed

    def _choose(self) -> v2.Transform:
        if self.mixup is None or self.cutmix is None:
            return self.mixup or self.cutmix
        return self.cutmix if torch.rand(()) < self.switch_p else self.mixup


def _build(
    transform: type[v2.Transform], name: str, alpha: float | None, num_classes: int
) -> v2.Transform | None:
    if alpha is None:
        return None
    if not (isinstance(alpha, (int, float)) and alpha > 0):
        raise ValueError(f"{name}={alpha!r} is not valid; allowed: a positive number, or null")
    return transform(alpha=alpha, num_classes=num_classes)
