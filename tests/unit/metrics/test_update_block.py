"""Updates of many steps at once give what each step gives alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchmetrics
from torch import Tensor

from app.metrics.stage_metrics import StageMetrics
from app.metrics.sum_metric import SumMetric
from app.metrics.update_block import MAX_BYTES, MAX_STEPS, StepSums, stack_sums
from tests.support.metrics import make_metric

VECTORIZED = ("accuracy", "total_correct", "mean_iou")
NAMES = (*VECTORIZED, "accuracy_top5", "f1", "precision", "mse")
NUM_STEPS = 3 * MAX_STEPS


def make_batches(name: str) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    shape = (4, 4) if name == "mean_iou" else ()
    sizes = [5] * (NUM_STEPS - 2) + [3, 5]
    if name == "mse":
        return [(torch.randn(size, 2), torch.randn(size, 2)) for size in sizes]
    return [(torch.randn(size, 7, *shape), torch.randint(7, (size, *shape))) for size in sizes]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("flushed_at", [(), (1, 4, 17, 18, 120)])
def test_blocks_give_the_sums_of_single_updates(name: str, flushed_at: tuple[int, ...]) -> None:
    stage, alone = StageMetrics({name: make_metric(name)}), SumMetric(make_metric(name))
    batches, steps, stacked = make_batches(name), [], []
    for number, batch in enumerate(batches):
        steps.append(stage.update(*batch)[name])
        if number in flushed_at:
            stacked.append(stack_sums(steps))
            steps = []
    stacked.append(stack_sums(steps))
    expected = [torch.stack(s) for s in zip(*(alone.sums(*b) for b in batches), strict=True)]
    actual = [torch.cat(parts) for parts in zip(*stacked, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_counts_are_vectorized_if_the_metric_can_be(name: str) -> None:
    stage = StageMetrics({name: make_metric(name)})
    steps = [stage.update(*batch)[name] for batch in make_batches(name)[:-2]]
    stack_sums(steps)
    metric = stage.sum_metrics[name]
    assert metric.is_vectorized == (name in VECTORIZED)
    assert all(torch.isfinite(state).all() for state in metric.metric.metric_state.values())


@pytest.mark.parametrize("name", NAMES)
def test_values_of_many_rows_are_those_of_each_row(name: str) -> None:
    metric = SumMetric(make_metric(name))
    rows = torch.stack(
        [torch.cat([s.flatten() for s in metric.sums(*b)]) for b in make_batches(name)]
    ).double()
    rows[3] = 0  # padding
    values = metric.values(rows)
    expected = [metric.value(row) for row in rows]
    assert np.array_equal(values, np.array(expected).reshape(-1), equal_nan=True)
    assert metric.is_elementwise == (name in ("accuracy", "total_correct", "mse"))


class PositiveCount(torchmetrics.Metric):
    """Counts by control flow that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, output: Tensor, target: Tensor) -> None:
        if (output > 0).all():
            self.count += len(target)

    def compute(self) -> Tensor:
        return self.count


def test_metric_that_cannot_be_vectorized_is_updated_step_by_step() -> None:
    stage = StageMetrics({"count": PositiveCount()})
    outputs = [torch.ones(2), -torch.ones(2)] * 4
    steps = [stage.update(output, output)["count"] for output in outputs]
    assert stack_sums(steps)[0].tolist() == [2, 0] * 4
    metric = stage.sum_metrics["count"]
    assert not metric.is_vectorized
    assert not isinstance(stage.update(outputs[0], outputs[0])["count"], StepSums)


def test_batches_may_be_changed_after_the_update() -> None:
    stage = StageMetrics({"correct": make_metric("total_correct")})
    output, target = torch.eye(3), torch.arange(3)
    steps = []
    for _ in range(3):
        steps.append(stage.update(output, target)["correct"])
        output, target = output.roll(1, 0), target.clone()
    output.zero_()
    target.zero_()
    assert stack_sums(steps)[0].tolist() == [3, 0, 0]


def test_sums_of_steps_that_are_dropped_are_not_counted() -> None:
    stage = StageMetrics({"correct": make_metric("total_correct")})
    right, wrong = (torch.eye(3), torch.arange(3)), (torch.eye(3).roll(1, 0), torch.arange(3))
    steps = [stage.update(*batch)["correct"] for batch in (right, wrong, right, wrong, right)]
    assert stack_sums([steps[0], steps[2], steps[4]])[0].tolist() == [3, 3, 3]


def test_padding_within_a_block_counts_for_nothing() -> None:
    stage = StageMetrics({"correct": make_metric("total_correct")})
    batch = torch.eye(3), torch.arange(3)
    steps = [stage.update(*batch)["correct"] for _ in range(3)]
    with stage.paused():
        steps.append(stage.update(*batch)["correct"])
    steps.append(stage.update(*batch)["correct"])
    assert stack_sums(steps)[0].tolist() == [3, 3, 3, 0, 3]


def test_large_batches_and_batches_of_various_forms_are_not_copied() -> None:
    stage = StageMetrics({"correct": make_metric("total_correct")})
    large = torch.zeros(1, MAX_BYTES // 8), torch.zeros(1, dtype=torch.long)
    assert not any(isinstance(stage.update(*large)["correct"], StepSums) for _ in range(3))
    for size in (1, 2, 3, 2, 1):
        various = torch.zeros(size, 2), torch.zeros(size, dtype=torch.long)
        assert not isinstance(stage.update(*various)["correct"], StepSums)
