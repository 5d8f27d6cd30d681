"""Training that becomes much slower is said once in the log."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from app.callbacks.slowdown import MIN_BLOCKS, Slowdown, describe_slowdown
from app.data.loaders import make_loader
from app.training import accumulator as accumulator_module
from app.training.accumulator import LoggedSteps
from app.training.limits import TrainingLimits
from app.training.step_timer import StepTimer
from tests.support.toy_training import DATA, make_mlp, make_trainer

STEPS_PER_EPOCH = 8


def train(
    folder: Path,
    step_times: Iterator[float],
    monkeypatch: pytest.MonkeyPatch,
    epochs: int,
    seconds_between_logs: float = 1e9,  # one block for each epoch
) -> None:
    """Train and validate epochs of eight steps, whose clock advances by the next of the times."""
    now = 0.0
    for name in ("SECONDS_TO_FIRST_LOG", "SECONDS_BETWEEN_LOGS"):
        monkeypatch.setattr(accumulator_module, name, seconds_between_logs)

    def timestamp(timer: StepTimer) -> float:  # noqa: ARG001
        nonlocal now
        now += next(step_times)
        return now

    monkeypatch.setattr(StepTimer, "_timestamp", timestamp)
    trainer = make_trainer(folder, make_mlp(), epochs, callbacks=Slowdown())
    trainer.limits = TrainingLimits(max_epochs=epochs, log_every_n_steps=4, sanity_valid_batches=0)
    trainer.fit(make_loader(DATA, len(DATA) // STEPS_PER_EPOCH), make_loader(DATA, len(DATA)))


def times(*epochs: float, valid: float = 0.1) -> Iterator[float]:
    """Yield the seconds of each tick: the start, the steps of an epoch, then its validation."""
    for seconds in epochs:
        yield 0.0
        yield from [seconds] * STEPS_PER_EPOCH
        yield from (0.0, valid)


def test_slow_epoch_is_logged_once_with_the_load_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usual = [0.1] * MIN_BLOCKS
    monkeypatch.setattr(os, "getloadavg", lambda: (9.0, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    train(tmp_path, times(*usual, 0.25, 0.31, 0.5), monkeypatch, MIN_BLOCKS + 3)
    assert [m for m in caplog.messages if "slowed down" in m] == [
        "epoch 7: training slowed down to 26 samples/s, the median of this run is 80; load average "
        "9.0 on 2 cores; other processes may need the cores: end or move them (top lists them)"
    ]


def test_steps_that_become_slow_within_an_epoch_are_logged_before_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logged: list[tuple[int, int]] = []
    on_steps_logged = Slowdown.on_steps_logged

    def observe(self: Slowdown, steps: LoggedSteps) -> None:
        on_steps_logged(self, steps)
        logged.append((len(steps.steps), len(caplog.messages)))

    monkeypatch.setattr(Slowdown, "on_steps_logged", observe)
    train(tmp_path, times(0.1, 0.1, 0.1, 1.0), monkeypatch, 4, seconds_between_logs=0.0)
    training = [entry for entry in logged if entry[0] == 4]
    assert training == [(4, 0)] * 6 + [(4, 1)] * 2


@pytest.mark.parametrize(
    ("step_times", "epochs"),
    [
        (times(*[0.1] * (MIN_BLOCKS - 1), 10.0), MIN_BLOCKS),
        (times(*[0.1] * MIN_BLOCKS, 0.29), MIN_BLOCKS + 1),
        (times(*[0.1] * (MIN_BLOCKS + 1), valid=9.0), MIN_BLOCKS + 1),
    ],
    ids=["few-blocks", "not-a-third", "slow-validation"],
)
def test_usual_speed_is_not_logged(
    step_times: Iterator[float],
    epochs: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    train(tmp_path, step_times, monkeypatch, epochs)
    assert "slowed down" not in caplog.text


def test_pause_between_two_steps_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    callback = Slowdown()
    for _ in range(MIN_BLOCKS):
        callback.on_steps_logged(block([0.1] * 4))
    callback.on_steps_logged(block([60.0, 0.1, 0.1, 0.1]))
    assert not caplog.messages
    callback.on_steps_logged(block([1.0] * 4))
    assert len(caplog.messages) == 1


def test_cause_is_the_data_if_steps_wait_for_it() -> None:
    assert "90% of it is waiting for data" in describe_slowdown(3, 10.0, 100.0, waiting=0.9)


def block(seconds: list[float]) -> LoggedSteps:
    steps = pd.DataFrame(
        {"iter": range(1, len(seconds) + 1), "num_samples": 8}
        | {"data_time": 0.0, "iter_time": seconds}
    )
    return LoggedSteps("train", 1, {}, lambda: steps, dict)
