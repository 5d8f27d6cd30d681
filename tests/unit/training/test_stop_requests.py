"""Callbacks that ask to end the training, and the time that is left of it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from app.data.loaders import make_loader
from app.training import time_left
from app.training.accumulator import StageResult
from app.training.checkpoint.train_state import TrainingEnd
from app.training.events import Callback, Callbacks, EpochEnd, StepEnd
from app.training.history import History
from app.training.limits import TrainingLimits
from app.training.time_left import TrainingClock
from tests.support.toy_training import DATA, make_mlp, make_trainer


class Stopper(Callback):
    """Asks to stop in one of the events of epoch 2."""

    def __init__(self, event: str) -> None:
        self.event = event
        self.seen: list[StepEnd] = []

    def ask(self, event: str, epoch: int) -> None:
        if event == self.event and epoch == 2:
            self.request_stop("it is enough")

    def on_step_end(self, step: StepEnd) -> None:
        self.seen.append(step)
        if step.step == 3:
            self.ask(f"step {step.stage}", step.epoch)

    def on_stage_end(self, result: StageResult, history: History) -> None:  # noqa: ARG002
        self.ask(f"stage {result.stage}", result.epoch)

    def on_epoch_end(self, end: EpochEnd) -> None:
        self.ask("epoch", end.epoch)


def fit(folder: Path, callback: Callback, resume: bool = False) -> list[tuple[int, str, int]]:
    trainer = make_trainer(folder, make_mlp(), epochs=5, callbacks=Callbacks([callback]))
    if resume:
        trainer.resume(folder / "checkpoints" / "last.safetensors")
    table = trainer.fit(make_loader(DATA, 8), make_loader(DATA, 16))
    assert trainer.outcome == "completed"
    assert resume or trainer.state.end is TrainingEnd.CALLBACK
    return list(zip(table["epoch"], table["stage"], table["total_samples"], strict=True))


@pytest.mark.parametrize(
    "event", ["step train", "step valid", "stage train", "stage valid", "epoch"]
)
def test_callback_ends_the_training_which_is_validated_and_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, event: str
) -> None:
    caplog.set_level(logging.INFO)
    samples = 24 if event == "step train" else 64
    expected = [(1, "train", 64), (1, "valid", 64), (2, "train", samples), (2, "valid", 64)]
    assert fit(tmp_path, Stopper(event)) == expected
    assert "stopped after epoch 2: it is enough" in caplog.text
    assert fit(tmp_path, Callback(), resume=True) == expected
    assert "nothing to train: training ended after epoch 2" in caplog.text


def test_steps_are_numbered_and_have_learning_rates(tmp_path: Path) -> None:
    callback = Stopper("epoch")
    fit(tmp_path, callback)
    train, valid = ([s for s in callback.seen if s.stage == stage] for stage in ("train", "valid"))
    assert [step.step for step in train] == [*range(1, 9)] * 2
    assert all(step.lrs == {"lr": 0.1} for step in train)
    assert all(step.lrs == {} for step in valid)
    left = [step.seconds_left for step in train]
    assert all(seconds is not None and seconds > 0 for seconds in left)


@pytest.mark.parametrize(
    ("limits", "batches_per_epoch", "position", "left"),
    [
        (TrainingLimits(max_epochs=4), 10, (0, 5, 5), 70.0),
        (TrainingLimits(max_epochs=4), 10, (2, 20, 20), 10.0),
        (TrainingLimits(max_epochs=4), None, (2, 20, 20), 10.0),
        (TrainingLimits(max_epochs=None, max_steps=40), None, (0, 10, 10), 30.0),
        (TrainingLimits(max_epochs=4, max_steps=20), 10, (0, 10, 10), 10.0),
        (TrainingLimits(max_epochs=4), 10, (0, 0, 0), None),
    ],
)
def test_time_left_follows_from_the_time_so_far(
    monkeypatch: pytest.MonkeyPatch,
    limits: TrainingLimits,
    batches_per_epoch: int | None,
    position: tuple[int, int, int],
    left: float | None,
) -> None:
    now = 100.0
    monkeypatch.setattr(time_left.time, "monotonic", lambda: now)
    clock = TrainingClock(limits, batches_per_epoch, 1)
    clock.start(0, 0, 0)
    now += 10.0
    assert clock.seconds_left(*position) == (None if left is None else pytest.approx(left))


def test_time_left_of_a_resumed_training_ignores_the_earlier_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(time_left.time, "monotonic", lambda: now)
    clock = TrainingClock(TrainingLimits(max_epochs=4), 10, 1)
    clock.start(2, 20, 20)
    now += 10.0
    assert clock.seconds_left(3, 30, 30) == pytest.approx(10.0)
