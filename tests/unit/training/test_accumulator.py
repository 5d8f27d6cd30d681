"""Exact values of steps and stages, for batches of any size."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
import torchmetrics
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)

from app.metrics.function import CorrectPredictions
from app.metrics.stage_metrics import StageMetrics
from app.metrics.sum_metric import has_small_sum_states
from app.metrics.update_block import stack_sums
from app.runtime.errors import UserError
from app.training import accumulator as accumulator_module
from app.training.accumulator import StageAccumulator, StageResult
from app.training.history import Point
from app.training.step_values import average

CPU = torch.device("cpu")
SIZES = [7, 7, 1, 4]


def make_metrics() -> dict[str, torchmetrics.Metric]:
    return {
        "accuracy": MulticlassAccuracy(3, average="micro", validate_args=False),
        "macro": MulticlassAccuracy(3, average="macro", validate_args=False),
        "f1": MulticlassF1Score(3, average="macro", validate_args=False),
        "total_correct": CorrectPredictions(),
        "auroc": MulticlassAUROC(3, validate_args=False),
        "confusion": MulticlassConfusionMatrix(3, validate_args=False),
        "large": MulticlassConfusionMatrix(30, validate_args=False),
    }


def make_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    outputs, targets = torch.randn(sum(SIZES), 3), torch.randint(0, 3, (sum(SIZES),))
    return list(zip(outputs.split(SIZES), targets.split(SIZES), strict=True))


def accumulate(flush_every: int = 50) -> StageResult:
    stage = StageMetrics(make_metrics())
    accumulator = StageAccumulator(stage, CPU, flush_every=flush_every)
    for outputs, targets in make_batches():
        loss = torch.nn.functional.cross_entropy(outputs, targets)
        accumulator.add(
            {"loss": average(loss, len(targets)), **stage.update(outputs, targets)}, {"lr": 0.1}
        )
    return accumulator.result("train", Point(2))


def test_stage_values_are_equal_to_one_update_with_all_samples() -> None:
    result = accumulate()
    outputs, targets = (torch.cat(parts) for parts in zip(*make_batches(), strict=True))
    for name, metric in make_metrics().items():
        expected = metric(outputs, targets).numpy()
        value = result.arrays[name] if name in result.arrays else result.row[name]
        # torchmetrics divides in float32
        np.testing.assert_allclose(value, expected, rtol=1e-6, err_msg=name)
    losses = torch.nn.functional.cross_entropy(outputs, targets, reduction="none").double()
    assert result.row["loss_mean"] == pytest.approx(losses.mean().item(), rel=1e-6)
    assert result.row["total_samples"] == sum(SIZES)


def test_step_values_are_equal_to_each_batch_alone() -> None:
    result = accumulate()
    assert result.steps["num_samples"].tolist() == SIZES
    assert result.steps["iter"].tolist() == [1, 2, 3, 4]
    for position, (outputs, targets) in enumerate(make_batches()):
        for name in ("accuracy", "macro", "f1", "total_correct"):
            expected = make_metrics()[name](outputs, targets).item()
            assert result.steps[name][position] == pytest.approx(expected, rel=1e-6), name
        loss = torch.nn.functional.cross_entropy(outputs, targets)
        assert result.steps["loss"][position] == loss.item()


def test_counts_are_integers_and_ratios_are_exact() -> None:
    result = accumulate()
    correct = result.row["total_correct"]
    assert isinstance(correct, int)
    assert result.row["accuracy"] == correct / sum(SIZES)
    assert result.arrays["confusion"].dtype == np.int64
    assert result.steps["total_correct"].dtype == np.int64


def test_metrics_with_large_or_list_states_are_reported_per_stage_only() -> None:
    columns = accumulate().steps.columns
    assert "auroc" not in columns
    assert "confusion" not in columns
    assert not has_small_sum_states(MulticlassAUROC(3))
    assert not has_small_sum_states(MulticlassConfusionMatrix(30))
    assert has_small_sum_states(MulticlassAccuracy(100))


def test_step_table_columns_are_in_order() -> None:
    expected = "epoch iter stage loss num_samples accuracy macro f1 total_correct lr iter_time"
    assert list(accumulate().steps.columns) == expected.split()


def test_loss_std_is_weighted_by_samples() -> None:
    result = accumulate()
    losses, counts = result.steps["loss"].to_numpy(), np.array(SIZES)
    mean = np.average(losses, weights=counts)
    expected = np.sqrt(np.average((losses - mean) ** 2, weights=counts))
    assert result.row["loss_std"] == pytest.approx(expected, rel=1e-12)


def test_flush_in_parts_does_not_change_the_table() -> None:
    at_once = accumulate()
    in_parts = accumulate(flush_every=3)
    times = ["iter_time"]
    assert at_once.steps.drop(columns=times).equals(in_parts.steps.drop(columns=times))


def test_metrics_start_each_step_and_each_stage_from_zero() -> None:
    stage = StageMetrics(make_metrics())
    outputs, targets = make_batches()[0]
    first, second = stage.update(outputs, targets), stage.update(outputs, targets)
    for name in first:
        sums = [stack_sums([step[name]]) for step in (first, second)]
        assert all(torch.equal(a, b) for a, b in zip(*sums, strict=True))
    StageAccumulator(stage, CPU)
    assert all(metric.update_count == 0 for metric in stage.accumulating_metrics.values())


class TwoValuesMetric(torchmetrics.Metric):
    """Returns a dict of two values."""

    total: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
        self.total += (preds.argmax(1) == target).sum()

    def compute(self) -> dict[str, torch.Tensor]:
        return {"right": self.total, "twice": 2 * self.total}


class PickyMetric(TwoValuesMetric):
    """Has no value for fewer than three correct predictions."""

    def compute(self) -> torch.Tensor:  # type: ignore[override]
        if 0 < self.total < 3:
            raise ValueError("too few")
        return self.total


def test_metric_with_several_values_becomes_several_columns() -> None:
    stage = StageMetrics({"two": TwoValuesMetric()})
    accumulator = StageAccumulator(stage, CPU)
    for outputs, targets in make_batches():
        accumulator.add(
            {"loss": average(torch.zeros(()), len(targets)), **stage.update(outputs, targets)}
        )
    row = accumulator.result("valid", Point(1)).row
    assert row["two_twice"] == 2 * row["two_right"]


def test_metric_without_a_value_is_empty_in_a_step_and_an_error_in_a_stage() -> None:
    stage = StageMetrics({"picky": PickyMetric()}, "valid")
    accumulator = StageAccumulator(stage, CPU)
    outputs = torch.eye(3)[torch.tensor([0, 0, 0, 0])]
    for count in (4, 1):
        sums = stage.update(outputs[:count], torch.zeros(count, dtype=torch.long))
        accumulator.add({"loss": average(torch.zeros(()), count), **sums})
    result = accumulator.result("valid", Point(1))
    assert result.row["picky"] == 5
    assert result.steps["picky"].tolist()[0] == 4
    assert np.isnan(result.steps["picky"][1])
    accumulator = StageAccumulator(stage, CPU)
    sums = stage.update(outputs[:1], torch.zeros(1, dtype=torch.long))
    accumulator.add({"loss": average(torch.zeros(()), 1), **sums})
    with pytest.raises(UserError, match=r"metric\.valid\.picky: too few"):
        accumulator.result("valid", Point(1))


def log_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SECONDS_TO_FIRST_LOG", "SECONDS_BETWEEN_LOGS"):
        monkeypatch.setattr(accumulator_module, name, 0.0)


def test_logged_steps_are_those_of_the_final_table(monkeypatch: pytest.MonkeyPatch) -> None:
    log_every_step(monkeypatch)
    stage, logged = StageMetrics(make_metrics()), []
    accumulator = StageAccumulator(stage, CPU, flush_every=3)
    for number, (outputs, targets) in enumerate(make_batches() * 3, start=1):
        loss = torch.nn.functional.cross_entropy(outputs, targets)
        accumulator.add(
            {"loss": average(loss, len(targets)), **stage.update(outputs, targets)},
            {"lr": number},
        )
        if accumulator.has_news():
            logged.append(accumulator.log("train", 2))
    iterations = [item.steps["iter"].tolist() for item in logged]
    assert iterations == [[1, 2, 3], [4], [5, 6], [7, 8, 9], [10, 11, 12]]
    result = accumulator.result("train", Point(2))
    pd.testing.assert_frame_equal(
        pd.concat([item.steps for item in logged], ignore_index=True), result.steps
    )
    so_far = logged[-1].so_far
    assert so_far["loss"] == result.row["loss_mean"]
    for name in ("accuracy", "macro", "f1", "total_correct"):
        assert so_far[name] == result.row[name]
    assert "confusion" not in so_far
    last = result.steps[-3:]
    assert logged[-1].recent["total_correct"] == last["total_correct"].sum()
    assert logged[-1].recent["loss"] == pytest.approx(
        np.average(last["loss"], weights=last["num_samples"])
    )


def test_values_are_logged_at_most_once_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    log_every_step(monkeypatch)
    accumulator = StageAccumulator(StageMetrics({}), CPU, flush_every=1)
    accumulator.add({"loss": average(torch.tensor(1.0), 2)})
    assert accumulator.has_news()
    monkeypatch.setattr(accumulator_module, "SECONDS_BETWEEN_LOGS", 1000.0)
    accumulator.log("train", 1)
    accumulator.add({"loss": average(torch.tensor(3.0), 2)})
    assert not accumulator.has_news()
    assert accumulator.so_far == {"loss": 1.0}


def test_resumed_stage_logs_the_steps_before_the_interruption(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log_every_step(monkeypatch)
    interrupted = StageAccumulator(StageMetrics({}), CPU)
    interrupted.add({"loss": average(torch.tensor(1.0), 2)}, {"lr": 0.1})
    resumed = StageAccumulator(StageMetrics({}), CPU, flush_every=2)
    resumed.load_state_dict(interrupted.state_dict())
    resumed.add({"loss": average(torch.tensor(3.0), 2)}, {"lr": 0.2})
    assert resumed.has_news()
    logged = resumed.log("train", 1)
    assert logged.steps[["iter", "loss", "lr"]].to_numpy().tolist() == [[1, 1, 0.1], [2, 3, 0.2]]
    assert logged.so_far == {"loss": 2.0}


def test_steps_that_turn_out_not_to_count_leave_the_values_so_far(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log_every_step(monkeypatch)
    accumulator = StageAccumulator(StageMetrics({}), CPU, flush_every=2)
    for value in (1.0, 2.0, 3.0):
        accumulator.add({"loss": average(torch.tensor(value), 2)})
        if accumulator.has_news():
            accumulator.log("train", 1)
    accumulator.mask_last(2)
    accumulator.add({"loss": average(torch.tensor(5.0), 2)})
    assert accumulator.has_news()
    assert accumulator.log("train", 1).so_far == {"loss": 3.0}  # the mean of 1 and 5


def test_mask_last_excludes_flushed_and_pending_steps() -> None:
    accumulator = StageAccumulator(StageMetrics({}), CPU)
    for number in range(7):
        accumulator.add({"loss": average(torch.tensor(float(number)), 2)})
        if number in (2, 4):
            accumulator.flush()
    accumulator.mask_last(5)
    steps = accumulator.result("train", Point(1)).steps
    assert steps["num_samples"].tolist() == [2, 2, 0, 0, 0, 0, 0]
    assert accumulator.result("train", Point(1)).row["loss_mean"] == 0.5
