"""Learning rate schedules per step and per epoch, with warm-up."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau, StepLR

from app.runtime.errors import UserError
from tests.support.fitting import build_trainer, fit
from tests.support.runs import config_issues, job_for
from tests.support.toy_training import lrs_of

FIVE_BATCHES = ("model=mlp", "trainer.limit_train_batches=5", "trainer.limit_valid_batches=1")


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
    for overrides in (("scheduler=cosine", "scheduler.warmup_steps=2"), ("scheduler=onecycle",)):
        _, recorder = fit(
            tmp_path / overrides[0], *FIVE_BATCHES, "trainer.max_epochs=3", *overrides
        )
        train_results = [result for result in recorder.results if result.stage == "train"]
        lrs = [lr for result in train_results for lr in result.steps["lr"]]
        assert len(lrs) == 15
        assert max(lrs) > 0.9e-3
        assert min(lrs[2:]) == lrs[-1] < 0.02e-3


@pytest.mark.parametrize(
    ("overrides", "warmup_steps"),
    [
        (("trainer.max_epochs=4",), 5),
        (("trainer.max_epochs=4", "trainer.accumulate_grad_batches=2"), 3),
        (("trainer.max_epochs=4", "trainer.max_steps=8"), 2),
        (("trainer.max_epochs=null", "trainer.max_steps=12"), 3),
        (("trainer.max_epochs=4", "scheduler.warmup_epochs=1.4"), 7),
    ],
)
def test_warmup_share_is_of_all_optimizer_steps_and_epochs_are_of_their_own(
    overrides: tuple[str, ...], warmup_steps: int, tmp_path: Path
) -> None:
    warmup = ("scheduler=multistep", "scheduler.warmup_steps=0.25")
    trainer, _ = build_trainer(job_for(*FIVE_BATCHES, *warmup, *overrides), tmp_path)
    (wrapper,) = trainer.optimizers.wrappers.values()
    assert wrapper.schedule.warmup_steps == warmup_steps


@pytest.mark.parametrize(
    ("overrides", "warnings"),
    [
        ((), []),
        (("scheduler.warmup_steps=4",), []),
        (("scheduler.warmup_steps=200",), ["=200: the learning rate rises during 15 of the run's"]),
        (("scheduler.warmup_steps=0.8",), ["=0.8: the learning rate rises during 12 of the run's"]),
        (("trainer.accumulate_grad_batches=5",), ["an epoch is a single optimizer step"]),
        (("scheduler.warmup_steps=200", "trainer.fast_dev_run=1"), []),
    ],
)
def test_runs_of_few_steps_are_warned_about(
    overrides: tuple[str, ...],
    warnings: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    build_trainer(job_for(*FIVE_BATCHES, "trainer.max_epochs=3", *overrides), tmp_path)
    found = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(found) == len(warnings)
    assert all(text in message for text, message in zip(warnings, found, strict=True))


def test_config_with_plateau_per_step_is_rejected() -> None:
    (issue,) = config_issues("scheduler=plateau", "scheduler.interval=step")
    assert issue == (
        "scheduler.interval='step': ReduceLROnPlateau steps once per epoch; allowed: epoch"
    )
