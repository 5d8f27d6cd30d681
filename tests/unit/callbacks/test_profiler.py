"""Profiles of training steps, read back from their files."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pandas as pd
import pytest
import torch

from app.callbacks.profiler import Profiler
from app.config.instantiate import Instantiator
from app.experiment.callbacks import make_callbacks
from app.training.events import StageStart, StepEnd
from app.training.history import Point
from tests.support.fitting import build_trainer
from tests.support.runs import job_for


def run_steps(profiler: Profiler, count: int, stage: str = "train") -> None:
    """Send the events of steps that multiply a matrix each."""
    profiler.on_stage_start(StageStart(stage, Point(1), count, None))
    for number in range(1, count + 1):
        torch.ones(8, 8) @ torch.ones(8, 8)
        profiler.on_step_end(StepEnd(stage, 1, 4, None, None, number))


def test_profile_has_the_steps_after_the_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    profiler = Profiler(tmp_path, steps=3)
    run_steps(profiler, 5, "valid")
    assert not (tmp_path / "profile").exists()
    run_steps(profiler, 20)
    table = pd.read_csv(tmp_path / "profile/operators.csv")
    products = table[table["operator"] == "aten::mm"]
    assert products["calls"].tolist() == [3]
    assert table["self_cpu_ms"].is_monotonic_decreasing
    assert table.columns.tolist()[:3] == ["operator", "calls", "self_cpu_ms"]
    events = json.loads((tmp_path / "profile/trace.json").read_text())["traceEvents"]
    assert sum(event["name"] == "aten::mm" for event in events) == 3
    assert "profile of 3 steps" in caplog.text
    before = (tmp_path / "profile/trace.json").stat().st_mtime_ns
    run_steps(profiler, 20)
    profiler.on_run_end([])
    assert (tmp_path / "profile/trace.json").stat().st_mtime_ns == before  # once per run


def test_short_training_is_profiled_after_its_first_step(tmp_path: Path) -> None:
    profiler = Profiler(tmp_path, steps=10)
    run_steps(profiler, 4)
    profiler.on_run_end([])
    table = pd.read_csv(tmp_path / "profile/operators.csv").set_index("operator")
    assert table["calls"]["aten::mm"] == 3


def test_no_steps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="steps=0; allowed: 1 or more"):
        Profiler(tmp_path, steps=0)


@pytest.mark.parametrize(("value", "steps"), [("true", [10]), ("2", [2]), ("false", [])])
def test_configuration_adds_the_profiler(tmp_path: Path, value: str, steps: list[int]) -> None:
    job = job_for("model=mlp", f"trainer.profile={value}", "callbacks=none")
    _, components = build_trainer(job, tmp_path)
    made = make_callbacks(job, Instantiator(), tmp_path, components)
    assert [callback.steps for callback in made] == steps  # type: ignore[attr-defined]
