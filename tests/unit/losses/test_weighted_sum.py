"""The weighted sum of terms, and the loss of a model that returns its own."""

from __future__ import annotations

import torch

from app.losses.weighted_sum import MeanOutputLoss
from tests.support.losses import (
    loss_and_gradient,
    make_logits,
)


def test_mean_output_loss_is_the_mean_of_the_output() -> None:
    output = make_logits(4, 3)
    value, gradient = loss_and_gradient(MeanOutputLoss(), output, torch.tensor([]))
    assert value == output.mean()
    assert torch.equal(gradient, torch.full_like(output, 1 / 12))
