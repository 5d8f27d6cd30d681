"""Learned and scheduled weights of loss terms."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.data.loaders import make_loader
from app.losses.weighted_sum import Term, WeightedSum
from app.losses.weights import LinearSchedule, ScheduledWeight, StepSchedule, UncertaintyWeight
from app.runtime.errors import UserError
from app.training.checkpoint.checkpoint import load_checkpoint
from tests.support.runs import config_issues
from tests.support.toy_training import DATA, make_mlp, make_trainer


def test_uncertainty_weights_follow_kendall_et_al() -> None:
    first, second = UncertaintyWeight("classification", 0.5), UncertaintyWeight("regression", -0.2)
    loss = WeightedSum(
        {"a": Term(F.cross_entropy, first, target=0), "b": Term(F.mse_loss, second, target=1)}
    )
    outputs = torch.randn(4, 2, requires_grad=True)
    targets = (torch.tensor([0, 1, 1, 0]), torch.randn(4, 2))
    total, terms = loss(outputs, targets)
    s = [0.5, -0.2]
    a, b = F.cross_entropy(outputs, targets[0]), F.mse_loss(outputs, targets[1])
    expected = math.exp(-s[0]) * a + s[0] / 2 + 0.5 * math.exp(-s[1]) * b + s[1] / 2
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(terms["b"], b)
    total.backward()
    torch.testing.assert_close(
        first.log_variance.grad, -math.exp(-s[0]) * a.detach() + 0.5, check_dtype=False
    )


def test_uncertainty_weights_are_trained_reported_and_saved(tmp_path: Path) -> None:
    learned = UncertaintyWeight()
    trainer = make_trainer(
        tmp_path, make_mlp(), loss={"entropy": Term(nn.CrossEntropyLoss(), learned)}
    )
    summary = trainer.fit(make_loader(DATA, 16))
    assert summary["entropy_weight"].iloc[0] != summary["entropy_weight"].iloc[-1]
    assert learned.log_variance.item() != 0
    state = load_checkpoint(tmp_path / "checkpoints" / "last.safetensors").task["loss"]
    assert [t.item() for t in state.values()] == [learned.log_variance.item()]
    other = make_trainer(
        tmp_path, make_mlp(), loss={"entropy": Term(nn.CrossEntropyLoss(), UncertaintyWeight())}
    )
    other.state.load_weights(tmp_path / "checkpoints" / "last.safetensors")
    assert (
        other.evaluate(make_loader(DATA, 64))["loss_mean"][0]
        == trainer.evaluate(make_loader(DATA, 64))["loss_mean"][0]
    )


@pytest.mark.parametrize(
    ("per", "expected"), [("step", [1, 2, 3, 4, 5, 6]), ("epoch", [1, 1, 2, 2, 3, 3])]
)
def test_scheduled_weights_change_per_step_or_per_epoch(
    tmp_path: Path, per: Any, expected: list[float]
) -> None:
    seen: list[float] = []

    class RecordingLoss(nn.CrossEntropyLoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            seen.append(schedule.value)
            return super().forward(input, target)

    schedule = ScheduledWeight(float, per)
    trainer = make_trainer(tmp_path, make_mlp(), loss={"entropy": Term(RecordingLoss(), schedule)})
    summary = trainer.fit(make_loader(DATA, 32))
    assert seen == expected
    assert summary["loss_mean"].iloc[-1] == pytest.approx(
        np.mean(expected[-2:]) * summary["entropy"].iloc[-1], rel=0.05
    )


def test_scheduled_weight_that_becomes_nan_is_rejected_by_name(tmp_path: Path) -> None:
    schedule = ScheduledWeight(lambda now: math.nan if now == 3 else 1.0, "step")
    trainer = make_trainer(
        tmp_path, make_mlp(), loss={"entropy": Term(nn.CrossEntropyLoss(), schedule)}
    )
    with pytest.raises(UserError, match=r"loss\.entropy\.weight is nan at step 3"):
        trainer.fit(make_loader(DATA, 8))


def test_config_with_scheduled_weight_that_starts_at_nan_is_rejected() -> None:
    node = (
        "loss.cross_entropy.weight={_target_: app.losses.weights.ScheduledWeight, "
        "function: {_target_: app.losses.weights.LinearSchedule, start: nan, end: 1.0, last: 3}}"
    )
    (issue,) = config_issues(node)
    assert "loss.cross_entropy.weight" in issue
    assert "nan at epoch 1" in issue


def test_config_with_constant_weight_nan_is_rejected() -> None:
    (issue,) = config_issues("loss.cross_entropy.weight=nan")
    assert issue.startswith("loss.cross_entropy:")
    assert "weight=nan must be a finite number" in issue


def test_config_with_scheduled_weight_as_valid_goal_is_rejected() -> None:
    weight = (
        "loss.cross_entropy.weight={_target_: app.losses.weights.ScheduledWeight, "
        "function: {_target_: app.losses.weights.LinearSchedule, start: 1.0, end: 2.0, last: 3}}"
    )
    (issue,) = config_issues(weight, "goal.metric=cross_entropy_weight")
    assert "is not measured in valid" in issue
    assert not config_issues(weight, "goal.metric=cross_entropy", "goal.mode=min")


def test_linear_and_step_schedules_return_expected_values() -> None:
    assert [LinearSchedule(0.0, 1.0, 3)(now) for now in (1, 2, 3, 9)] == [0.0, 0.5, 1.0, 1.0]
    assert [StepSchedule(1.0, {3: 0.5, "5": 0.1})(now) for now in (1, 2, 3, 4, 5, 6)] == [
        1,
        1,
        0.5,
        0.5,
        0.1,
        0.1,
    ]
