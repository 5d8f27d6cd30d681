"""What the progress bar and the log show while a stage runs."""

from __future__ import annotations

import io
import logging
import sys

import pandas as pd
import pytest

from app.callbacks.progress import Progress
from app.training.accumulator import StageResult
from app.training.events import StageStart, StepEnd
from app.training.history import Point

START = StageStart("train", Point(3), 10, 100, 12)
SO_FAR = {"loss": 0.51234, "accuracy": 0.875, "total_correct": 70}
VALUES = "loss 0.5123, accuracy 0.875, lr 0.001, run left 1:01:40"


def step(number: int) -> StepEnd:
    return StepEnd("train", 3, 10, None, None, number, SO_FAR, {"lr": 0.001}, 3700.0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bar_shows_epoch_values_so_far_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    progress = Progress()
    progress.on_stage_start(START)
    progress.on_step_end(step(1))
    assert progress.bar is not None
    progress.bar.refresh()
    shown = terminal.getvalue().split("\r")[-1]
    assert "epoch 3/12 train" in shown
    assert "10.0/100" in shown
    assert "samples/s" in shown
    assert VALUES in shown
    progress.on_run_end([])


def test_log_has_a_line_at_each_interval(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    progress = Progress(seconds_between_lines=1e-9)
    progress.on_stage_start(START)
    progress.on_step_end(step(1))
    (line,) = caplog.messages
    assert line.startswith("epoch 3/12 train: 10 of 100 samples, ")
    assert f"samples/s, {VALUES}, train left 0:00:0" in line
    progress.seconds_between_lines = progress.next_line_time = 1e12
    progress.on_step_end(step(2))
    assert len(caplog.messages) == 1


def test_resumed_epoch_continues_where_it_stopped(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    progress = Progress(seconds_between_lines=1e-9)
    progress.on_stage_start(START)
    progress.on_step_end(step(8))
    assert "80 of 100 samples" in caplog.text


@pytest.mark.parametrize(("waiting", "is_said"), [(0.2, False), (0.5, True)])
def test_waiting_for_data_is_said_once(
    caplog: pytest.LogCaptureFixture, waiting: float, is_said: bool
) -> None:
    caplog.set_level(logging.INFO)
    progress = Progress()
    steps = pd.DataFrame({"data_time": [waiting] * 2, "iter_time": [1.0] * 2})
    for _ in range(2):
        progress.on_stage_start(START)
        progress.on_stage_end(StageResult("train", Point(3), {}, steps, {}), [])
    said = [line for line in caplog.messages if "50 % of the time of epoch 3 was spent" in line]
    assert len(said) == is_said
