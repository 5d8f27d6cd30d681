"""Inputs and comparisons for tests of losses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.testing import assert_close

Loss = Callable[[Tensor, Tensor], Tensor]
SHAPES = [(4, 3), (2, 3, 5, 4), (2, 3, 4, 3, 5)]  # of class, image and volume logits
SPATIAL_SHAPES = SHAPES[1:]
IGNORE_INDEX = 255


def make_logits(*shape: int) -> Tensor:
    """Return float64 logits, the same in every call."""
    generator = torch.Generator().manual_seed(1)
    return 2 * torch.randn(*shape, dtype=torch.float64, generator=generator)


def make_labels(*shape: int, classes: int = 3) -> Tensor:
    """Return integer labels, the same in every call."""
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(2))


def make_labels_for(output: Tensor) -> Tensor:
    """Return labels (N, ...) for logits (N, C, ...); binary ones if C is 1."""
    return make_labels(len(output), *output.shape[2:], classes=max(output.shape[1], 2))


def loss_and_gradient(loss: Loss, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss and its gradient with respect to the output."""
    output = output.clone().requires_grad_()
    value = loss(output, target)
    (gradient,) = torch.autograd.grad(value, output)
    return value.detach(), gradient


def assert_matches(loss: Loss, reference: Loss, output: Tensor, target: Tensor) -> None:
    """Assert that two losses have the same value and gradient.

    The tolerance allows for float64 rounding in another order of summation.
    """
    actual = loss_and_gradient(loss, output, target)
    expected = loss_and_gradient(reference, output, target)
    assert_close(actual, expected, rtol=1e-10, atol=1e-13)


def add_channel_dim(loss: nn.Module) -> Loss:
    """Wrap a MONAI loss, which expects labels of shape (N, 1, ...)."""
    return lambda output, target: loss(output, target.unsqueeze(1))
