"""TensorBoard event files, read back with TensorBoard."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from app.callbacks.tensorboard import TensorBoard
from app.config.schema import GoalConfig
from app.training.events import EpochEnd
from app.training.history import Point
from tests.support.callback_events import logged_steps, send_stage, stage_result


def test_iterations_are_written_once_while_a_stage_runs_and_after_a_resume(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def written() -> list[tuple[int, float]]:
        events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        return [(scalar.step, scalar.value) for scalar in events.Scalars("train_step/loss")]

    first = TensorBoard(tmp_path, nn.Linear(2, 2), config, hparams=False)
    first.on_stage_end(stage_result("train"), [])
    first.on_steps_logged(logged_steps(1.0, 2.0))
    assert written() == [(1, 0.5), (2, 1.0), (3, 2.0)]
    resumed = TensorBoard(tmp_path, nn.Linear(2, 2), config, hparams=False)
    resumed.load_state_dict(first.state_dict())
    resumed.on_steps_logged(logged_steps(1.0, 2.0, 3.0))
    result = stage_result("train", 2)
    resumed.on_stage_end(replace(result, steps=logged_steps(1.0, 2.0, 3.0, 4.0).steps), [])
    resumed.on_run_end([result.row])
    first.writer.close()
    assert written() == [(1, 0.5), (2, 1.0), (3, 2.0), (4, 3.0), (5, 4.0)]


def test_graph_leaves_model_and_rng_unchanged(tmp_path: Path, config: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(784), nn.Dropout(0.5), nn.Linear(784, 10))
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rng_state = torch.get_rng_state()
    callback = TensorBoard(tmp_path, model, config, graph=True)
    images = torch.zeros(4, 1, 28, 28)
    send_stage(callback, [((images, torch.zeros(4)), torch.zeros(4, 10))], "train")
    assert [module.training for module in model] == [True, False, True, True]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng_state)


def test_graph_that_cannot_be_traced_logs_a_warning(
    tmp_path: Path, config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    callback = TensorBoard(tmp_path, nn.Linear(3, 3), config, graph=True)
    send_stage(callback, [((torch.zeros(4, 2), torch.zeros(4)), torch.zeros(4, 3))], "train")
    assert "cannot log the graph of the model" in caplog.text


def test_steps_continue_over_epochs_and_nan_weights_have_no_histogram(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, torch.nan)
    callback = TensorBoard(tmp_path, model, config, histograms_every_n_epochs=2, hparams=False)
    for epoch in (1, 2):
        callback.on_stage_end(stage_result("train", epoch), [])
        callback.on_epoch_end(EpochEnd(Point(epoch), [], GoalConfig("loss", "min"), 0.0, None))
    callback.on_run_end([stage_result("train").row])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [scalar.step for scalar in events.Scalars("train_step/loss")] == [1, 2]
    assert events.Tags()["histograms"] == ["weights/bias"]
    assert [histogram.step for histogram in events.Histograms("weights/bias")] == [2]
