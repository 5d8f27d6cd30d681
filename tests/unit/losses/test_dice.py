"""Dice losses and their gradients, compared with MONAI and hand computations."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from monai.losses.dice import DiceCELoss
from monai.losses.dice import DiceLoss as MonaiDiceLoss
from torch import Tensor, nn

from app.losses.dice import DiceCrossEntropyLoss, DiceLoss
from tests.support.losses import (
    IGNORE_INDEX,
    SPATIAL_SHAPES,
    add_channel_dim,
    assert_matches,
    make_labels,
    make_labels_for,
    make_logits,
)


@pytest.mark.parametrize("shape", SPATIAL_SHAPES)
@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("smooth", [1e-5, 1.0])
def test_dice_loss_matches_monai(
    shape: tuple[int, ...], per_sample: bool, background: bool, smooth: float
) -> None:
    reference = MonaiDiceLoss(
        softmax=True,
        to_onehot_y=True,
        include_background=background,
        batch=not per_sample,
        smooth_nr=smooth,
        smooth_dr=smooth,
    )
    output = make_logits(*shape)
    loss = DiceLoss(smooth, background, per_sample=per_sample)
    assert_matches(loss, add_channel_dim(reference), output, make_labels_for(output))


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("background", [True, False])
def test_dice_loss_of_single_output_matches_sigmoid_dice_of_monai(
    per_sample: bool, background: bool
) -> None:
    reference = MonaiDiceLoss(sigmoid=True, batch=not per_sample)
    output = make_logits(2, 1, 5, 4)
    loss = DiceLoss(include_background=background, per_sample=per_sample)
    assert_matches(loss, add_channel_dim(reference), output, make_labels_for(output))


def test_dice_loss_matches_hand_computation() -> None:
    output = torch.tensor([[0.0, math.log(3)], [math.log(3), 0.0]], dtype=torch.float64)
    # sample 0: p = (1/4, 3/4), label 1; sample 1: p = (3/4, 1/4), label 1; smooth 1
    per_class = [1 - 1 / 1.25, 1 - 2.5 / 2.75, 1 - 1 / 1.75, 1 - 1.5 / 2.25]
    assert DiceLoss(smooth=1.0)(output, torch.tensor([1, 1])).item() == pytest.approx(
        sum(per_class) / 4, rel=1e-12
    )


def test_dice_loss_accepts_probability_targets() -> None:
    output, target = make_logits(2, 3, 5, 4), make_logits(2, 3, 5, 4).flip(0).softmax(dim=1)
    reference = MonaiDiceLoss(softmax=True, soft_label=False, smooth_nr=1e-5, smooth_dr=1e-5)
    assert_matches(DiceLoss(), reference, output, target)
    one_hot = F.one_hot(make_labels_for(output), 3).movedim(-1, 1)
    assert torch.equal(
        DiceLoss()(output, one_hot.double()), DiceLoss()(output, make_labels_for(output))
    )


def test_dice_loss_of_absent_class_is_zero() -> None:
    output = torch.tensor([[60.0, -60.0, -60.0]], dtype=torch.float64)
    assert DiceLoss()(output, torch.tensor([0])).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("shape", SPATIAL_SHAPES)
@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize(("dice", "cross_entropy"), [(1.0, 1.0), (0.25, 2.0), (0.0, 1.0)])
def test_dice_cross_entropy_loss_matches_monai(
    shape: tuple[int, ...], background: bool, dice: float, cross_entropy: float
) -> None:
    reference = DiceCELoss(
        softmax=True,
        to_onehot_y=True,
        include_background=background,
        lambda_dice=dice,
        lambda_ce=cross_entropy,
    )
    output = make_logits(*shape)
    loss = DiceCrossEntropyLoss(dice, cross_entropy, include_background=background)
    assert_matches(loss, add_channel_dim(reference), output, make_labels_for(output))


def test_dice_cross_entropy_loss_of_single_output_is_binary() -> None:
    output = make_logits(2, 1, 5, 4)
    reference = DiceCELoss(sigmoid=True)
    assert_matches(
        DiceCrossEntropyLoss(), add_channel_dim(reference), output, make_labels_for(output)
    )


def test_dice_cross_entropy_loss_accepts_probability_targets() -> None:
    output, target = make_logits(2, 3, 5, 4), make_logits(2, 3, 5, 4).flip(0).softmax(dim=1)
    assert_matches(DiceCrossEntropyLoss(dice_weight=0), nn.CrossEntropyLoss(), output, target)


def test_dice_cross_entropy_loss_of_single_output_excludes_ignored_positions_from_mean() -> None:
    output, target = make_logits(2, 1, 5, 4), make_labels(2, 5, 4, classes=2)
    target[:, 2] = IGNORE_INDEX

    def reference(output: Tensor, target: Tensor) -> Tensor:
        kept = target != IGNORE_INDEX
        return F.binary_cross_entropy_with_logits(output[:, 0][kept], target[kept].double())

    assert_matches(DiceCrossEntropyLoss(0.0, ignore_index=IGNORE_INDEX), reference, output, target)
