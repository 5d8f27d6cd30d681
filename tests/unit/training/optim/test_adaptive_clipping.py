"""Adaptive gradient clipping."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from app.training.optim.adaptive_clipping import clip_gradients_adaptively
from app.training.optim.optim_wrapper import OptimWrapper


@pytest.mark.parametrize("shape", [(6,), (4, 3), (4, 3, 2, 2)])
def test_gradient_of_each_unit_is_at_most_a_share_of_its_weights(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(shape))
    with torch.no_grad():
        parameter[0] = 0.0  # the norm of its weights counts as 1e-3
    parameter.grad = torch.randn(shape)
    parameter.grad[-1] *= 1e-3
    before = parameter.grad.clone()
    clip_gradients_adaptively([parameter, nn.Parameter(torch.ones(1))], 0.1)

    def units(tensor: Tensor) -> Tensor:
        return tensor.detach().reshape(len(tensor) if tensor.ndim > 1 else 1, -1)

    weights, gradients, clipped = units(parameter), units(before), units(parameter.grad)
    for weight, gradient, result in zip(weights, gradients, clipped, strict=True):
        limit = 0.1 * max(weight.norm().item(), 1e-3)
        expected = gradient * min(1.0, limit / gradient.norm().item())
        torch.testing.assert_close(result, expected)


def test_wrapper_clips_adaptively_but_for_what_is_excluded() -> None:
    first, last = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    optimizer = torch.optim.SGD([first, last], lr=1.0)
    wrapper = OptimWrapper(optimizer, clip_agc=0.01, agc_excluded=[last])
    wrapper.step((first * 3 + last * 3).sum(), 1)
    torch.testing.assert_close(first.detach(), torch.full((2, 2), 0.99))
    assert torch.equal(last.detach(), torch.full((2, 2), -2.0))
