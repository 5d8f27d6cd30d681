"""Metrics from plain functions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sklearn import metrics as sklearn
from sklearn.metrics.pairwise import paired_cosine_distances
from torch import Tensor
from torch.nn.functional import mse_loss

from app.metrics.function import CorrectPredictions, CosineSimilarity, FunctionMetric
from tests.support.metrics import assert_metric_equals, make_images, make_regression


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


@pytest.mark.parametrize("channels", [1, 3])
def test_cosine_similarity_of_images_matches_scikit_learn(channels: int) -> None:
    outputs, targets = make_images(8, channels)
    vectors = (tensor.flatten(1).numpy() for tensor in (outputs, targets))
    expected = 1 - paired_cosine_distances(*vectors).mean()
    assert 0.5 < expected < 0.999
    assert_metric_equals(CosineSimilarity(), outputs, targets, expected)


def test_cosine_similarity_of_other_shapes_is_refused() -> None:
    outputs, targets = make_images(8)
    with pytest.raises(ValueError, match=r"same shape \(N, ...\); got \[12, 3, 8, 8\] and \[12\]"):
        CosineSimilarity().update(outputs, targets[:, 0, 0, 0])


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_correct_predictions_of_one_output_are_those_of_its_sign(shape: tuple[int, ...]) -> None:
    logits, targets = torch.tensor([[2.0], [-1], [0.5], [-3], [1], [-1]]), [1, 0, 0, 1, 1, 1]
    metric = CorrectPredictions()
    metric.update(logits, torch.tensor(targets).reshape(shape))
    assert metric.compute() == 3
