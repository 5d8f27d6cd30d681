"""The weighted sum of terms, and the loss of a model that returns its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from app.losses.dice import DiceLoss
from app.losses.weighted_sum import MeanOutputLoss, Term, WeightedSum, as_loss
from app.runtime.errors import UserError
from tests.support.losses import (
    loss_and_gradient,
    make_logits,
)


def test_mean_output_loss_is_the_mean_of_the_output() -> None:
    output = make_logits(4, 3)
    value, gradient = loss_and_gradient(MeanOutputLoss(), output, torch.tensor([]))
    assert value == output.mean()
    assert torch.equal(gradient, torch.full_like(output, 1 / 12))


def test_single_term_without_weight_has_no_column() -> None:
    outputs, targets = torch.randn(6, 2), torch.tensor([0, 1, 1, 0, 1, 0])
    loss = WeightedSum({"a": Term(nn.CrossEntropyLoss(), 2.0)})
    total, terms = loss(outputs, targets)
    assert terms["a"] * 2 == total
    assert WeightedSum({"a": Term(nn.CrossEntropyLoss())})(outputs, targets)[1] == {}


def test_label_outside_the_classes_is_named_with_the_range_of_labels() -> None:
    loss = as_loss({"dice": DiceLoss()})
    with pytest.raises(UserError, match=r"loss\.dice: .* shape \[2, 4, 4\] with labels 0 to 3\)"):
        loss(torch.zeros(2, 3, 4, 4), torch.arange(4).expand(2, 4, 4))
