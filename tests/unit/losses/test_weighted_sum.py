"""The weighted sum of terms, and the loss of a model that returns its own."""

from __future__ import annotations

import torch
from torch import nn

from app.losses.weighted_sum import MeanOutputLoss, Term, WeightedSum
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
