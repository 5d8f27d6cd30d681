"""Learning rate schedules per step and per epoch, with warm-up."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau, StepLR

from app.runtime.errors import UserError
from tests.support.fitting import fit
from tests.support.runs import config_issues
from tests.support.toy_training import lrs_of


def test_scheduler_steps_per_step_or_per_epoch() -> None:
    halve = lambda o: StepLR(o, 1, gamma=0.5)  # noqa: E731
    assert lrs_of(halve, 4) == [1.0, 0.5, 0.25, 0.125]
    assert lrs_of(halve, 5, per_epoch=True) == [1.0, 1.0, 0.5, 0.5, 0.25]


def test_warmup_multiplies_the_rates_of_any_scheduler() -> None:
    halve = lambda o: StepLR(o, 1, gamma=0.5)  # noqa: E731
    assert lrs_of(lambda o: None, 5, warmup=4) == [0.25, 0.5, 0.75, 1.0, 1.0]  # noqa: ARG005
    assert lrs_of(halve, 4, warmup=2) == [0.5, 0.5, 0.25, 0.125]
    assert lrs_of(halve, 5, warmup=4, per_epoch=True) == [0.25, 0.5, 0.375, 0.5, 0.25]


def test_plateau_scheduler_receives_the_value_of_the_goal() -> None:
    plateau = lambda o: ReduceLROnPlateau(o, "max", 0.1, patience=1)  # noqa: E731
    assert lrs_of(plateau, 8, per_epoch=True)[-2:] == pytest.approx([0.1, 0.1])


def test_scheduler_that_returns_nan_is_rejected_by_name() -> None:
    broken = lambda o: LambdaLR(o, lambda step: math.nan if step == 2 else 1.0)  # noqa: E731
    with pytest.raises(
        UserError, match=r"scheduler\.lr_scheduler: LambdaLR returned the learning rate nan"
    ):
        lrs_of(broken, 4)


def test_scheduler_length_auto_is_the_length_of_the_run(tmp_path: Path) -> None:
    few = ("trainer.limit_train_batches=5", "trainer.limit_valid_batches=1", "model=mlp")
    for overrides in (("scheduler=cosine", "scheduler.warmup_steps=2"), ("scheduler=onecycle",)):
        _, recorder = fit(tmp_path / overrides[0], *few, "trainer.max_epochs=3", *overrides)
        train_results = [result for result in recorder.results if result.stage == "train"]
        lrs = [lr for result in train_results for lr in result.steps["lr"]]
        assert len(lrs) == 15
        assert max(lrs) > 0.9e-3
        assert min(lrs[2:]) == lrs[-1] < 0.02e-3


def test_config_with_plateau_per_step_is_rejected() -> None:
    (issue,) = config_issues("scheduler=plateau", "scheduler.interval=step")
    assert issue == (
        "scheduler.interval='step': ReduceLROnPlateau steps once per epoch; allowed: epoch"
    )
