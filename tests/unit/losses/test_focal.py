"""Focal losses and their gradients, compared with torchvision, MONAI and hand computations."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from monai.losses.focal_loss import FocalLoss as MonaiFocalLoss
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.ops import sigmoid_focal_loss

from app.losses.focal import BinaryFocalLoss, FocalLoss
from tests.support.losses import (
    SHAPES,
    SPATIAL_SHAPES,
    assert_matches,
    loss_and_gradient,
    make_labels,
    make_labels_for,
    make_logits,
)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.5])
@pytest.mark.parametrize("alpha", [None, 0.25])
def test_binary_focal_loss_matches_torchvision(gamma: float, alpha: float | None) -> None:
    output, target = make_logits(6, 5), make_labels(6, 5, classes=2).double()
    torchvision_alpha = -1 if alpha is None else alpha
    reference = partial(sigmoid_focal_loss, alpha=torchvision_alpha, gamma=gamma, reduction="mean")
    assert_matches(BinaryFocalLoss(gamma, alpha), reference, output, target)
    assert_matches(BinaryFocalLoss(gamma, alpha), reference, output, 0.8 * target + 0.1)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("alpha", [None, 0.25])
def test_focal_loss_of_two_classes_matches_binary_focal_loss(
    gamma: float, alpha: float | None
) -> None:
    weights = None if alpha is None else [1 - alpha, alpha]

    def two_classes(output: Tensor, target: Tensor) -> Tensor:
        pairs = torch.stack([torch.zeros_like(output), output], dim=1)
        value: Tensor = FocalLoss(gamma, weights)(pairs, target)
        return value

    def one_logit(output: Tensor, target: Tensor) -> Tensor:
        torchvision_alpha = -1 if alpha is None else alpha
        value: Tensor = sigmoid_focal_loss(
            output, target.double(), torchvision_alpha, gamma, reduction="mean"
        )
        return value

    assert_matches(two_classes, one_logit, make_logits(8), make_labels(8, classes=2))


@pytest.mark.parametrize("shape", SPATIAL_SHAPES)
@pytest.mark.parametrize("gamma", [0.5, 2.0])
@pytest.mark.parametrize("alpha", [None, [0.5, 1.0, 2.0]])
def test_focal_loss_matches_monai(
    shape: tuple[int, ...], gamma: float, alpha: list[float] | None
) -> None:
    mean_over_classes = MonaiFocalLoss(use_softmax=True, to_onehot_y=True, gamma=gamma, alpha=alpha)

    def reference(output: Tensor, target: Tensor) -> Tensor:
        value: Tensor = 3 * mean_over_classes(output, target.unsqueeze(1))
        return value

    output = make_logits(*shape)
    actual = loss_and_gradient(FocalLoss(gamma, alpha), output, make_labels_for(output))
    expected = loss_and_gradient(reference, output, make_labels_for(output))
    # MONAI computes in float32
    assert_close(actual, expected, rtol=1e-5, atol=1e-7, check_dtype=False)


@pytest.mark.parametrize("shape", SHAPES)
def test_focal_loss_with_gamma_zero_equals_cross_entropy(shape: tuple[int, ...]) -> None:
    output = make_logits(*shape)
    assert_matches(FocalLoss(0.0), nn.CrossEntropyLoss(), output, make_labels_for(output))
    target = make_labels_for(output).double().expand(3, *shape[:1], *shape[2:]).transpose(0, 1) % 2
    assert_matches(BinaryFocalLoss(0.0), nn.BCEWithLogitsLoss(), output, target)


def test_focal_loss_matches_hand_computation() -> None:
    output = torch.tensor([[0.0, math.log(3)], [math.log(3), 0.0]], dtype=torch.float64)
    target = torch.tensor([1, 1])  # of probabilities 3/4 and 1/4
    losses = [2 * (1 / 4) ** 2 * math.log(4 / 3), 2 * (3 / 4) ** 2 * math.log(4)]
    actual = FocalLoss(2.0, [1.0, 2.0])(output, target)
    assert actual.item() == pytest.approx(sum(losses) / 2, rel=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("size", [90.0, 1e4])
def test_focal_loss_gradients_of_saturated_outputs_are_finite(gamma: float, size: float) -> None:
    output = torch.tensor([[size, -size], [-size, size]])
    for target in (torch.tensor([0, 1]), torch.tensor([1, 0])):
        value, gradient = loss_and_gradient(FocalLoss(gamma), output, target)
        assert torch.isfinite(gradient).all()
        assert torch.isfinite(value)
        one_hot = F.one_hot(target).float()
        value, gradient = loss_and_gradient(BinaryFocalLoss(gamma), output, one_hot)
        assert torch.isfinite(gradient).all()
        assert torch.isfinite(value)


def test_focal_loss_alpha_is_not_in_state_dict() -> None:
    assert not FocalLoss(alpha=[1.0, 2.0]).state_dict()
    assert len(list(FocalLoss(alpha=[1.0, 2.0]).buffers())) == 1
