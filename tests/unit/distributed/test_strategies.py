"""Norms and checks of gradients that several functions of torch share."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from app.distributed.strategies import nonfinite_indicator, total_norm

SHAPES = ((3, 5), (), (70,), (2, 3, 4, 4))


def make_tensors(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    tensors[3] = tensors[3].to(memory_format=torch.channels_last)
    tensors[0] = tensors[0].t()
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_indicator_finds_each_element_and_changes_none(
    dtype: torch.dtype, value: float
) -> None:
    tensors = make_tensors(dtype)
    tensors[2][:3] = torch.tensor([-0.0, torch.finfo(dtype).tiny / 2, 1.0])
    before = [tensor.clone() for tensor in tensors]
    assert nonfinite_indicator(tensors).item() == 0
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy)
        assert torch.equal(tensor.signbit(), copy.signbit())
    for number in range(len(tensors)):
        for index in (0, -1):
            changed = [tensor.clone() for tensor in tensors]
            changed[number][(index,) * changed[number].ndim] = value
            assert nonfinite_indicator(changed).item() != 0


def test_nonfinite_indicator_of_large_finite_values_is_zero() -> None:
    tensors = [torch.full((2,), 1e30), torch.ones(3)]
    assert nonfinite_indicator(tensors).item() == 0
    assert math.isinf(total_norm(tensors))


def test_norm_and_indicator_of_mixed_and_sparse_tensors() -> None:
    sparse = torch.tensor([4.0, 0.0, 2.0, 0.0]).to_sparse()
    tensors = [sparse, torch.tensor([1.0]), torch.tensor([2.0], dtype=torch.float64)]
    assert total_norm(tensors).item() == pytest.approx(5, rel=1e-6)  # float32
    assert nonfinite_indicator(tensors).item() == 0
    tensors[1][0] = math.nan
    assert nonfinite_indicator(tensors).item() != 0


def test_total_norm_is_bitwise_that_of_torch() -> None:
    tensors = make_tensors(torch.float32)
    assert torch.equal(total_norm(tensors), torch.nn.utils.get_total_norm(tensors))
