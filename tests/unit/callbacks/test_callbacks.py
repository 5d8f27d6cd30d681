"""Those who watch: the files they leave are read back with the libraries that they are for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from app.callbacks.image_grids import scaled
from app.callbacks.lambda_callback import LambdaCallback
from app.callbacks.log_values import final_metrics
from app.callbacks.mlflow import MLflow, allowed
from app.callbacks.predictions import PredictionWriter
from app.callbacks.samples import SampleImages
from app.callbacks.selection import class_outputs
from app.callbacks.tables import Tables
from app.callbacks.tensorboard import TensorBoard
from app.callbacks.wandb import WeightsAndBiases
from app.config.schema import GoalConfig
from app.runtime.errors import UserError
from app.training.accumulator import StageResult
from app.training.events import Callback, EpochEnd, StageStart, StepEnd
from tests.support.runs import job_for


@pytest.fixture(scope="session")
def config() -> dict[str, Any]:
    """A whole configuration."""
    return job_for("model=mlp").plain


def result(stage: str = "valid", epoch: int = 1, **row: float) -> StageResult:
    numbers = {"epoch": epoch, "stage": stage, "loss_mean": 0.5, **row}
    steps = pd.DataFrame(
        {"epoch": epoch, "iter": [1], "stage": stage, "loss": 0.5, "num_samples": 4}
        | {"iter_time": 0.5}
    )
    return StageResult(stage, epoch, numbers, steps, {})


def tell(
    callback: Callback, batches: list[tuple[Any, Any]], stage: str = "valid", epoch: int = 1
) -> StageResult:
    """A whole stage of batches and outputs."""
    callback.on_stage_start(StageStart(stage, epoch, len(batches), None))
    for batch, outputs in batches:
        callback.on_step_end(StepEnd(stage, epoch, len(batch[0]), batch, outputs))
    ended = result(stage, epoch)
    callback.on_stage_end(ended, [ended.row])
    return ended


def test_drawing_the_graph_leaves_the_model_and_chance_alone(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(784), nn.Dropout(0.5), nn.Linear(784, 10))
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    chance = torch.get_rng_state()
    board = TensorBoard(tmp_path, model, config, graph=True)
    images = torch.zeros(4, 1, 28, 28)
    tell(board, [((images, torch.zeros(4)), torch.zeros(4, 10))], "train")
    assert [module.training for module in model] == [True, False, True, True]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), chance)


def test_a_model_that_cannot_be_drawn_is_a_warning(
    tmp_path: Path, config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    board = TensorBoard(tmp_path, nn.Linear(3, 3), config, graph=True)
    tell(board, [((torch.zeros(4, 2), torch.zeros(4)), torch.zeros(4, 3))], "train")
    assert "graph cannot be drawn" in caplog.text


def test_steps_go_on_over_epochs_and_diverged_weights_are_no_error(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, torch.nan)
    board = TensorBoard(tmp_path, model, config, histograms_every_n_epochs=2, hparams=False)
    for epoch in (1, 2):
        board.on_stage_end(result("train", epoch), [])
        board.on_epoch_end(EpochEnd(epoch, [], GoalConfig("loss", "min"), None, 1, 0.0))
    board.on_run_end([result("train").row])
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [scalar.step for scalar in found.Scalars("train_step/loss")] == [1, 2]
    assert found.Tags()["histograms"] == ["weights/bias"]
    assert [histogram.step for histogram in found.Histograms("weights/bias")] == [2]


@pytest.mark.parametrize("kind", [MLflow, WeightsAndBiases])
def test_a_run_that_goes_on_is_the_same_run(
    elsewhere: Path, config: dict[str, Any], kind: type[MLflow] | type[WeightsAndBiases]
) -> None:
    first = kind(elsewhere, config)
    first.on_stage_start(StageStart("train", 1, 1, 1))
    again = kind(elsewhere, config)
    again.load_state_dict(first.state_dict())
    first.on_run_end([])
    again.on_stage_start(StageStart("train", 2, 1, 1))
    assert again.state_dict() == first.state_dict()
    assert again.state_dict()["run"]
    again.on_run_end([])


def test_mlflow_leaves_no_run_active(elsewhere: Path, config: dict[str, Any]) -> None:
    import mlflow

    callback = MLflow(elsewhere, config)
    assert not (elsewhere / "mlruns").exists()  # a rank that is not watched writes nothing
    tell(callback, [])
    assert mlflow.active_run() is None
    callback.on_run_end([result(accuracy=0.5).row])
    assert len(list((elsewhere / "mlruns").glob("*/*/meta.yaml"))) == 1


def test_mlflow_takes_any_name() -> None:
    assert allowed("train/f1+f2 (a)") == "train/f1_f2 _a_"


def test_the_outcome_is_the_best_and_the_last() -> None:
    history = [result(epoch=1, accuracy=0.9).row, result(epoch=2, accuracy=0.8).row]
    found = final_metrics(history, GoalConfig("accuracy", "max"))
    assert found["best/accuracy"] == 0.9
    assert found["best/epoch"] == 1
    assert found["valid/accuracy"] == 0.8


@pytest.mark.parametrize(
    ("kind", "modules", "extra"),
    [
        (TensorBoard, ["tensorboard", "torch.utils.tensorboard"], "tensorboard"),
        (MLflow, ["mlflow", "mlflow.tracking"], "mlflow"),
        (WeightsAndBiases, ["wandb"], "wandb"),
    ],
)
def test_a_missing_library_says_how_to_get_it(
    kind: Any,
    modules: list[str],
    extra: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    config: dict[str, Any],
) -> None:
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    offers = {"model": nn.Linear(1, 1)} if kind is TensorBoard else {}
    with pytest.raises(UserError, match=rf'pip install -e "\.\[{extra}\]"'):
        kind(folder=tmp_path, config=config, **offers)


def test_losses_say_which_outputs_are_logits() -> None:
    terms = {
        "a": {"function": {"_target_": "torch.nn.CrossEntropyLoss"}, "output": "head"},
        "b": {"function": {"_target_": "app.losses.dice.DiceCrossEntropyLoss"}, "output": 1},
        "c": {"function": {"_target_": "torch.nn.MSELoss"}, "output": "image"},
        "d": None,
        "e": {"function": {"_target_": "app.losses.focal.FocalLoss"}},
    }
    assert class_outputs({"loss": terms}) == ["head", 1, None]


def test_predictions_come_every_n_epochs_and_after_the_test(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    writer = PredictionWriter(tmp_path, config, ["valid", "test"], every_n_epochs=2)
    batch = (torch.zeros(4, 1, 2, 2), torch.zeros(4, dtype=torch.long))
    for stage, epoch in [("valid", 1), ("train", 2), ("valid", 2), ("valid", 3), ("test", 3)]:
        tell(writer, [(batch, torch.eye(4))] * 2, stage, epoch)
    assert sorted(path.name for path in (tmp_path / "predictions").iterdir()) == [
        "epoch002_valid",
        "epoch003_test",
    ]
    table = pd.read_csv(tmp_path / "predictions/epoch002_valid/predictions.csv")
    assert table["label"].tolist() == [0, 1, 2, 3] * 2


def test_predictions_say_so_where_there_are_no_outputs(
    tmp_path: Path, config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    tell(PredictionWriter(tmp_path, config), [((torch.zeros(2, 1), torch.zeros(2)), None)], "test")
    assert "its steps tell no outputs" in caplog.text


def test_what_is_no_choice_is_refused_before_anything_runs(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=r"\['train'\]; allowed: valid, test"):
        PredictionWriter(tmp_path, config, ["train"])
    with pytest.raises(UserError, match="format='jpg'; allowed: auto, csv, png, npz"):
        PredictionWriter(tmp_path, config, format="jpg")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="every_n_epochs=0; allowed: 1 or more"):
        SampleImages(tmp_path, config, every_n_epochs=0)
    with pytest.raises(UserError, match="mode='off'; allowed: offline, online"):
        WeightsAndBiases(tmp_path, config, mode="off")  # type: ignore[arg-type]


# Samples


def picture(path: Path) -> Tensor:
    """A PNG file as (3, height, width) in [0, 1]."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255


def test_label_maps_stand_below_the_inputs(tmp_path: Path, config: dict[str, Any]) -> None:
    drawn = SampleImages(tmp_path, config, count=3)
    labels = torch.randint(0, 4, (4, 8, 6), generator=torch.Generator().manual_seed(0))
    logits = nn.functional.one_hot(labels, 4).permute(0, 3, 1, 2).float()
    images = torch.rand(4, 1, 8, 6)
    targets = labels.clone()
    targets[:, 0] = 255  # ignored
    tell(drawn, [((images[:2], targets[:2]), logits[:2]), ((images[2:], targets[2:]), logits[2:])])
    found = picture(tmp_path / "samples/epoch001_valid.png")
    # Three columns, three lines, two pixels between and around them.
    assert found.shape == (3, 3 * (8 + 2) + 2, 3 * (6 + 2) + 2)
    tiles = found[:, 2:, 2:].unfold(1, 8, 10).unfold(2, 6, 8)
    inputs, predicted, true = tiles[:, 0], tiles[:, 1], tiles[:, 2]
    torch.testing.assert_close(inputs[0], scaled(images[:3])[:, 0], atol=1 / 255, rtol=0)
    assert torch.equal(predicted[:, :, 1:], true[:, :, 1:])
    assert true[:, :, 0].max() == 0
    colors = {tuple(predicted[:, n, y, x].tolist()) for n, y, x in np.ndindex(3, 8, 6)}
    assert len(colors) == 4


def test_images_stand_below_the_inputs_enlarged(tmp_path: Path, config: dict[str, Any]) -> None:
    outputs = {"image": torch.rand(2, 3, 8, 8), "code": torch.rand(2, 5)}
    tell(
        SampleImages(tmp_path, config, ["test"]),
        [((torch.rand(2, 1, 4, 4), torch.zeros(2)), outputs)],
        "test",
    )
    found = picture(tmp_path / "samples/epoch001_test.png")
    assert found.shape == (3, 2 * (8 + 2) + 2, 2 * (8 + 2) + 2)
    expected = scaled(outputs["image"])[1]
    torch.testing.assert_close(found[:, 12:20, 12:20], expected, atol=1 / 255, rtol=0)


def test_inputs_that_are_no_images_are_a_warning(
    tmp_path: Path, config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    batch = (torch.zeros(2, 5), torch.zeros(2, dtype=torch.long))
    tell(SampleImages(tmp_path, config), [(batch, torch.zeros(2, 3))])
    assert "no part of the inputs is an image" in caplog.text
    assert not (tmp_path / "samples").exists()


def test_tables_leave_the_frame_that_others_see(tmp_path: Path) -> None:
    tables = Tables(tmp_path, throughput=True, memory=True)
    ended = tell(tables, [((torch.zeros(4),), None)])
    assert not {"samples/s", "memory_mb"} & set(ended.steps)
    written = pd.read_csv(tmp_path / "epoch_details/epoch001_valid.csv")
    assert written["samples/s"].tolist() == [8.0]


def test_tables_without_options_have_no_such_columns(tmp_path: Path) -> None:
    tell(Tables(tmp_path), [((torch.zeros(4),), None)])
    written = pd.read_csv(tmp_path / "epoch_details/epoch001_valid.csv")
    assert not {"samples/s", "memory_mb"} & set(written)


def test_events_without_a_function_are_passed_over() -> None:
    heard: list[object] = []
    callback = LambdaCallback(on_run_end=heard.append)
    tell(callback, [((torch.zeros(1),), None)])
    callback.on_run_end([])
    assert heard == [[]]


# Choosing them


def test_an_option_is_the_default_set_and_one_more() -> None:
    plain = job_for("callbacks=wandb").plain["callbacks"]
    assert list(plain) == ["tables", "progress", "console", "plots", "wandb"]


def test_several_are_added_by_a_list() -> None:
    both = "callbacks/single@callbacks=[tensorboard,samples]"
    plain = job_for(both, "callbacks.samples.count=2", "~callbacks.plots").plain["callbacks"]
    assert list(plain) == ["tables", "progress", "console", "tensorboard", "samples"]
    assert plain["samples"]["count"] == 2
