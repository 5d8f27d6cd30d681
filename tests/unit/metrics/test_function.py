"""Metrics from plain functions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sklearn import metrics as sklearn
from torch import Tensor
from torch.nn.functional import mse_loss

from app.metrics.function import FunctionMetric
from tests.support.metrics import (
    assert_metric_equals,
    make_regression,
)


def per_sample(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean(dim=1)


@pytest.mark.parametrize("function", [mse_loss, per_sample])
def test_function_metric_is_the_mean_over_samples(
    function: Callable[[Tensor, Tensor], Tensor],
) -> None:
    outputs, targets = make_regression(4)
    expected = sklearn.mean_squared_error(targets.numpy(), outputs.numpy())
    assert_metric_equals(FunctionMetric(function), outputs, targets, expected)


def test_function_metric_with_wrong_output_shape_raises() -> None:
    with pytest.raises(ValueError, match=r"a tensor of shape \(60, 4\); allowed: a scalar"):
        FunctionMetric(torch.sub).update(*make_regression(4))
