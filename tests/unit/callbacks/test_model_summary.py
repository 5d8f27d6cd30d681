"""The file and the log of the model's modules."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from app.callbacks.model_summary import ModelSummary
from app.config.instantiate import Instantiator
from app.distributed.strategies import SingleDevice
from app.experiment.callbacks import make_callbacks
from app.experiment.factory import make_components
from app.experiment.optimizers import make_optimizers
from app.runtime.device import choose_device
from app.training.events import StageStart
from app.training.history import Point
from app.training.model_summary import count_bytes
from tests.support.runs import job_for

TRAIN = StageStart("train", Point(1), 1, 1)


def summary_callback(folder: Path, *overrides: str) -> tuple[ModelSummary, Any]:
    job = job_for("model=mlp", "trainer.limit_train_batches=1", *overrides)
    instantiator = Instantiator(job.trusted)
    components = make_components(job.config, instantiator, choose_device("cpu"))
    callbacks = make_callbacks(job, instantiator, folder, components)
    (callback,) = [c for c in callbacks if isinstance(c, ModelSummary)]
    optimizers = make_optimizers(
        job.config, instantiator, components, SingleDevice(components.task.model)
    )
    components.task.prepare_training(optimizers)
    return callback, components


def test_model_summary_is_logged_and_written_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback, _ = summary_callback(tmp_path)
    caplog.set_level(logging.INFO)
    callback.on_stage_start(StageStart("valid", Point(0), 1, 1))
    assert not (tmp_path / "model_summary.csv").exists()
    callback.on_stage_start(TRAIN)
    callback.on_stage_start(TRAIN)
    assert caplog.text.count("101,770 parameters, 101,770 of them trained") == 1
    table = pd.read_csv(tmp_path / "model_summary.csv")
    assert table["parameters"][0] == 101_770
    assert table["flops"][0] == 2 * (784 * 128 + 128 * 10)


def test_model_summary_optimizer_memory_is_that_of_a_real_step(tmp_path: Path) -> None:
    callback, components = summary_callback(
        tmp_path, "optimizer=adamw", "+freeze.a={parameters: layers.1.*}"
    )
    assert callback.summary is not None
    task = components.task
    components.freezing.apply(1)
    task.model.train()
    task.train_step(components.loaders["train"].first(8))
    state = task.optimizer.optimizer.state
    expected = sum(count_bytes(values.values()) for values in state.values())
    assert callback.summary.optimizer_bytes == expected > 0
    assert callback.summary.gradient_bytes == callback.summary.rows[0].trainable * 4


def test_model_summary_other_modes_measure_nothing(tmp_path: Path) -> None:
    def fail() -> Any:
        raise AssertionError

    callback = ModelSummary(tmp_path, {"mode": "test"}, fail)
    callback.on_stage_start(StageStart("test", Point(1), 1, 1))
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="allowed: -1"):
        ModelSummary(tmp_path, {"mode": "test"}, fail, max_depth=-2)
