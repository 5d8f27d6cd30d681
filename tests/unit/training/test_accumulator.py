"""What steps return adds up exactly, whatever the sizes of batches."""

from __future__ import annotations

import numpy as np
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
from app.metrics.stage_metrics import StageMetrics, has_small_sum_states
from app.runtime.errors import UserError
from app.training import accumulator as records
from app.training.accumulator import StageAccumulator, StageResult, average

CPU = torch.device("cpu")
SIZES = [7, 7, 1, 4]


def metrics() -> dict[str, torchmetrics.Metric]:
    return {
        "accuracy": MulticlassAccuracy(3, average="micro", validate_args=False),
        "macro": MulticlassAccuracy(3, average="macro", validate_args=False),
        "f1": MulticlassF1Score(3, average="macro", validate_args=False),
        "total_correct": CorrectPredictions(),
        "auroc": MulticlassAUROC(3, validate_args=False),
        "confusion": MulticlassConfusionMatrix(3, validate_args=False),
        "large": MulticlassConfusionMatrix(30, validate_args=False),
    }


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    outputs, targets = torch.randn(sum(SIZES), 3), torch.randint(0, 3, (sum(SIZES),))
    return list(zip(outputs.split(SIZES), targets.split(SIZES), strict=True))


def collect() -> StageResult:
    stage = StageMetrics(metrics())
    rows = StageAccumulator(stage, CPU)
    for outputs, targets in batches():
        loss = torch.nn.functional.cross_entropy(outputs, targets)
        rows.add({"loss": average(loss, len(targets)), **stage.update(outputs, targets)}, {"lr": 0.1})
    return rows.result("train", 2)


def test_stage_values_are_those_of_all_samples_at_once() -> None:
    result = collect()
    outputs, targets = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    for name, metric in metrics().items():
        expected = metric(outputs, targets).numpy()
        found = result.arrays[name] if name in result.arrays else result.row[name]
        # torchmetrics divides in float32
        np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=name)
    losses = torch.nn.functional.cross_entropy(outputs, targets, reduction="none").double()
    assert result.row["loss_mean"] == pytest.approx(losses.mean().item(), rel=1e-6)
    assert result.row["total_samples"] == sum(SIZES)


def test_step_values_are_those_of_each_batch() -> None:
    result = collect()
    assert result.steps["num_samples"].tolist() == SIZES
    assert result.steps["iter"].tolist() == [1, 2, 3, 4]
    for position, (outputs, targets) in enumerate(batches()):
        for name in ("accuracy", "macro", "f1", "total_correct"):
            expected = metrics()[name](outputs, targets).item()
            assert result.steps[name][position] == pytest.approx(expected, rel=1e-6), name
        loss = torch.nn.functional.cross_entropy(outputs, targets)
        assert result.steps["loss"][position] == loss.item()


def test_counts_stay_whole_and_shares_are_exact() -> None:
    result = collect()
    correct = result.row["total_correct"]
    assert isinstance(correct, int)
    assert result.row["accuracy"] == correct / sum(SIZES)
    assert result.arrays["confusion"].dtype == np.int64
    assert result.steps["total_correct"].dtype == np.int64


def test_metrics_of_wide_or_listed_states_are_reported_per_stage_only() -> None:
    columns = collect().steps.columns
    assert "auroc" not in columns
    assert "confusion" not in columns
    assert not has_small_sum_states(MulticlassAUROC(3))
    assert not has_small_sum_states(MulticlassConfusionMatrix(30))
    assert has_small_sum_states(MulticlassAccuracy(100))


def test_columns_stand_in_order() -> None:
    expected = "epoch iter stage loss num_samples accuracy macro f1 total_correct lr iter_time"
    assert list(collect().steps.columns) == expected.split()


def test_spread_of_the_loss_is_weighted_by_samples() -> None:
    result = collect()
    losses, counts = result.steps["loss"].to_numpy(), np.array(SIZES)
    mean = np.average(losses, weights=counts)
    expected = np.sqrt(np.average((losses - mean) ** 2, weights=counts))
    assert result.row["loss_std"] == pytest.approx(expected, rel=1e-12)


def test_rows_may_be_brought_to_the_host_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = collect()
    monkeypatch.setattr(records, "FLUSH_EVERY", 3)
    parts = collect()
    times = ["iter_time"]
    assert whole.steps.drop(columns=times).equals(parts.steps.drop(columns=times))


def test_a_metric_starts_each_step_and_each_stage_from_zero() -> None:
    stage = StageMetrics(metrics())
    outputs, targets = batches()[0]
    first, second = stage.update(outputs, targets), stage.update(outputs, targets)
    for name in first:
        assert all(torch.equal(a, b) for a, b in zip(first[name], second[name], strict=True))
    StageAccumulator(stage, CPU)
    assert all(metric.update_count == 0 for metric in stage.accumulating_metrics.values())


class Pair(torchmetrics.Metric):
    """Sums, and a value that is no single tensor."""

    total: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
        self.total += (preds.argmax(1) == target).sum()

    def compute(self) -> dict[str, torch.Tensor]:
        return {"right": self.total, "twice": 2 * self.total}


class Shy(Pair):
    """Has no value for less than three right ones."""

    def compute(self) -> torch.Tensor:  # type: ignore[override]
        if 0 < self.total < 3:
            raise ValueError("too few")
        return self.total


def test_values_that_are_several_become_several_columns() -> None:
    stage = StageMetrics({"pair": Pair()})
    rows = StageAccumulator(stage, CPU)
    for outputs, targets in batches():
        rows.add({"loss": average(torch.zeros(()), len(targets)), **stage.update(outputs, targets)})
    row = rows.result("valid", 1).row
    assert row["pair_twice"] == 2 * row["pair_right"]


def test_a_step_without_a_value_is_blank_and_a_stage_without_one_names_the_metric() -> None:
    stage = StageMetrics({"shy": Shy()}, "valid")
    rows = StageAccumulator(stage, CPU)
    outputs = torch.eye(3)[torch.tensor([0, 0, 0, 0])]
    for count in (4, 1):
        sums = stage.update(outputs[:count], torch.zeros(count, dtype=torch.long))
        rows.add({"loss": average(torch.zeros(()), count), **sums})
    result = rows.result("valid", 1)
    assert result.row["shy"] == 5
    assert result.steps["shy"].tolist()[0] == 4
    assert np.isnan(result.steps["shy"][1])
    rows = StageAccumulator(stage, CPU)
    sums = stage.update(outputs[:1], torch.zeros(1, dtype=torch.long))
    rows.add({"loss": average(torch.zeros(()), 1), **sums})
    with pytest.raises(UserError, match=r"metric\.valid\.shy: too few"):
        rows.result("valid", 1)


def test_steps_count_nothing_across_what_was_brought_in() -> None:
    rows = StageAccumulator(StageMetrics({}), CPU)
    for number in range(7):
        rows.add({"loss": average(torch.tensor(float(number)), 2)})
        if number in (2, 4):
            rows.flush()
    rows.mask_last(5)
    assert rows.result("train", 1).steps["num_samples"].tolist() == [2, 2, 0, 0, 0, 0, 0]
    assert rows.result("train", 1).row["loss_mean"] == 0.5
