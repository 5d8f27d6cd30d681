"""Losses that divide by something else than the number of samples, over batches and epochs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from app.losses.focal import FocalLoss
from app.losses.weighted_sum import Term, WeightedSum
from app.metrics.stage_metrics import StageMetrics
from app.training.accumulator import StageAccumulator
from app.training.history import Point
from app.training.optim.optim_wrapper import OptimWrapper
from app.training.step_values import average

WEIGHTS = torch.tensor([0.2, 1.0, 5.0])
SIZES = [4, 4, 1, 3]
LOSSES = {
    "weights": (nn.CrossEntropyLoss(WEIGHTS), ()),
    "weights and smoothing": (nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.2), ()),
    "ignored class": (nn.CrossEntropyLoss(ignore_index=1), ()),
    "ignored pixels": (nn.CrossEntropyLoss(ignore_index=1), (2, 3)),
    "weights and ignored pixels": (nn.CrossEntropyLoss(WEIGHTS, ignore_index=1), (2, 3)),
    "nll": (nn.NLLLoss(WEIGHTS), ()),
    "focal": (FocalLoss(ignore_index=1), (2, 3)),
    "samples": (nn.CrossEntropyLoss(), ()),
}


def make_data(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    count = sum(SIZES)
    inputs = torch.rand(count, 3, *shape, generator=generator)
    targets = torch.randint(0, 3, (count, *shape), generator=generator)
    targets[SIZES[0] + SIZES[1]] = 1  # where 1 is ignored, the third batch counts for nothing
    return inputs, targets


class ScaledLogits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale.reshape(1, 3, *[1] * (x.ndim - 2))
        return (scale * x).log_softmax(dim=1)


@pytest.mark.parametrize("name", LOSSES)
def test_accumulated_batches_are_equal_to_one_batch(name: str) -> None:
    function, shape = LOSSES[name]
    loss, (inputs, targets) = WeightedSum({"main": Term(function)}), make_data(shape)

    def train(sizes: list[int]) -> Tensor:
        model = ScaledLogits()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        wrapper = OptimWrapper(optimizer, batch_size=4, accumulate=len(sizes))
        for x, y in zip(inputs.split(sizes), targets.split(sizes), strict=True):
            wrapper.step(loss(model(x), y)[0], len(x), loss.samples_weight(y))
        return model.scale.detach()

    torch.testing.assert_close(train(SIZES), train([sum(SIZES)]))


@pytest.mark.parametrize("name", LOSSES)
def test_mean_of_an_epoch_does_not_depend_on_the_batches(name: str) -> None:
    function, shape = LOSSES[name]
    loss, (inputs, targets) = WeightedSum({"main": Term(function)}), make_data(shape)
    accumulator = StageAccumulator(StageMetrics({}), torch.device("cpu"))
    for x, y in zip(inputs.split(SIZES), targets.split(SIZES), strict=True):
        value, _ = loss(x.log(), y)
        accumulator.add({"loss": average(value, len(x), loss.samples_weight(y))})
    result = accumulator.result("valid", Point(1))
    expected = copy.deepcopy(function)(inputs.log(), targets).item()
    assert result.row["loss_mean"] == pytest.approx(expected, rel=1e-6)
    assert result.steps["num_samples"].tolist() == SIZES
    assert not result.steps["loss"].isna().any()


def test_batch_of_ignored_positions_has_a_loss_of_zero_and_no_gradient() -> None:
    loss = WeightedSum({"main": Term(nn.CrossEntropyLoss(ignore_index=2))})
    output = torch.rand(2, 3, 4, requires_grad=True)
    value, _ = loss(output, torch.full((2, 4), 2))
    value.backward()
    assert value.item() == 0
    assert output.grad is not None
    assert output.grad.abs().sum() == 0


def test_weight_of_a_batch_is_in_units_of_samples() -> None:
    term = Term(nn.CrossEntropyLoss(ignore_index=0))
    weight = term.samples_weight(torch.tensor([[0, 1], [1, 1]]))
    assert weight is not None
    assert weight.item() == 1.5


def test_own_loss_can_say_what_it_divides_by() -> None:
    class MeanOverPositive(nn.Module):
        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return (output * target).sum() / target.sum()

        def normalizer(self, target: Tensor) -> Tensor:
            return target.sum()

    weight = WeightedSum({"main": Term(MeanOverPositive())}).samples_weight(torch.tensor([1, 0, 3]))
    assert weight is not None
    assert weight.item() == 4


def test_several_terms_count_by_samples() -> None:
    terms = {"a": Term(nn.CrossEntropyLoss(WEIGHTS)), "b": Term(nn.CrossEntropyLoss())}
    assert WeightedSum(terms).samples_weight(torch.tensor([0, 1])) is None
