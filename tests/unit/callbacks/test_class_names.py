"""Names of classes and paths of samples in tables, plots, titles and predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from app.callbacks.batch_images import BatchImages, denormalize, draw_captioned_images
from app.callbacks.image_grids import SampleBuffer
from app.callbacks.plots import Plots, draw_matrix, draw_vector
from app.callbacks.prediction_files import class_colors
from app.callbacks.predictions import PredictionWriter
from app.callbacks.selection import classes_of_metric
from app.callbacks.tables import Tables
from app.training.accumulator import StageResult
from app.training.events import StepEnd
from app.training.history import Point
from tests.support.callback_events import send_stage, stage_result

NAMES = ["cat", "dog", "$x_{$", "=1+1"]


@pytest.fixture
def named(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a run with four classes that have names."""
    data = config["data"] | {"class_names": NAMES, "num_classes": 4}
    matrix = {"_target_": "torchmetrics.classification.MulticlassConfusionMatrix", "num_classes": 4}
    dice = {"_target_": "app.metrics.segmentation.DicePerClass", "num_classes": 4}
    test = {"matrix": matrix, "dice": dice, "curve": {"_target_": "torchmetrics.X"}}
    return config | {"data": data, "metric": {"train": {}, "valid": {}, "test": test}}


def result_with(**arrays: np.ndarray) -> StageResult:
    plain = stage_result("test", 3)
    return StageResult("test", Point(3), plain.row, plain.steps, arrays)


def test_only_values_per_class_get_names(named: dict[str, Any]) -> None:
    assert classes_of_metric(named, "test", "matrix", 4) == NAMES
    assert classes_of_metric(named, "test", "dice", 3) == NAMES[1:]
    assert classes_of_metric(named, "test", "curve", 4) is None
    assert classes_of_metric(named, "test", "matrix", 5) is None
    assert classes_of_metric(None, "test", "matrix", 4) is None
    unnamed = named | {"data": named["data"] | {"class_names": None}}
    assert classes_of_metric(unnamed, "test", "matrix", 4) == ["0", "1", "2", "3"]


def test_tables_name_columns_by_class(tmp_path: Path, named: dict[str, Any]) -> None:
    result = result_with(matrix=np.arange(16).reshape(4, 4), curve=np.arange(4.0))
    Tables(tmp_path, config=named).on_stage_end(result, [result.row])
    details = tmp_path / "epoch_details"
    table = pd.read_csv(details / "epoch003_test_matrix.csv")
    assert list(table.columns) == ["cat", "dog", "$x_{$", "'=1+1"]
    assert table["dog"].tolist() == [1, 5, 9, 13]
    assert list(pd.read_csv(details / "epoch003_test_curve.csv").columns) == ["0", "1", "2", "3"]


def test_plots_have_one_tick_per_class_and_a_normalized_matrix(
    tmp_path: Path, named: dict[str, Any]
) -> None:
    result = result_with(matrix=np.diag([4, 3, 2, 0]))
    Plots(tmp_path, named).on_stage_end(result, [result.row])
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        "test_matrix.png",
        "test_matrix_normalized.png",
    }
    for figure in (
        draw_vector(np.arange(4.0), "title", NAMES),
        draw_matrix(np.eye(4), "title", NAMES),
    ):
        axis = figure.axes[0].xaxis
        assert [text.get_text() for text in axis.get_ticklabels()] == NAMES
        assert axis.get_ticklocs().tolist() == [0, 1, 2, 3]
    many = [str(k) for k in range(60)]
    labels = draw_vector(np.arange(60.0), "title", many).axes[0].get_xticklabels()
    assert len(labels) < 60


def test_predictions_have_names_and_paths(tmp_path: Path, named: dict[str, Any]) -> None:
    paths = {"test": ["cat/1.jpg", "dog/2.jpg", "dog/3.jpg", "unused.jpg"]}
    writer = PredictionWriter(tmp_path, named, paths=paths)
    batch = (torch.zeros(3, 1), torch.tensor([0, 1, 1]))
    send_stage(writer, [(batch, torch.eye(4)[:3])], "test")
    table = pd.read_csv(tmp_path / "predictions/epoch001_test/predictions.csv")
    assert list(table.columns[:6]) == [
        "sample",
        "path",
        "target",
        "target_name",
        "label",
        "label_name",
    ]
    assert table["path"].tolist() == paths["test"][:3]
    assert table["target_name"].tolist() == ["cat", "dog", "dog"]
    assert table["label_name"].tolist() == ["cat", "dog", "$x_{$"]


def test_sample_titles_are_names(named: dict[str, Any]) -> None:
    samples = SampleBuffer(named, 2)
    batch = (torch.zeros(2, 1, 4, 4), torch.tensor([1, 1]))
    samples.add(StepEnd("valid", 1, 2, batch, torch.eye(4)[:2]))
    assert samples.titles() == ["cat / dog", "dog / dog"]


def test_batch_images_show_the_first_batch_once_without_normalization(
    tmp_path: Path, named: dict[str, Any]
) -> None:
    normalize = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    config = named | {"data": named["data"] | {"normalize": normalize}, "mode": "train"}
    images = torch.rand(10, 3, 100, 100)
    batch = ((images - 0.5) / 0.25, torch.arange(10) % 4)
    callback = BatchImages(tmp_path, config, count=9)
    other = (torch.zeros_like(images), batch[1])
    send_stage(callback, [(batch, None), (other, None)], "train")
    send_stage(callback, [(batch, None)], "test")
    grid = Image.open(tmp_path / "train_batch.png")
    assert grid.size == (8 * 104, 2 * 118)  # 9 images, with captions
    first = torch.from_numpy(np.asarray(grid)[2:102, 2:102].copy()).permute(2, 0, 1) / 255
    torch.testing.assert_close(first, images[0], atol=0.5 / 255 + 1e-6, rtol=0)
    content = (tmp_path / "train_batch.png").read_bytes()
    send_stage(callback, [(other, None)], "train")
    send_stage(callback, [(other, None)], "train", epoch=2)
    assert (tmp_path / "train_batch.png").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["train_batch.png"]


def test_batch_images_of_masks_show_them_with_a_legend(
    tmp_path: Path, named: dict[str, Any]
) -> None:
    config = named | {"data": named["data"] | {"normalize": None}, "mode": "train"}
    images, masks = torch.zeros(2, 3, 100, 100), torch.full((2, 100, 100), 255)
    masks[:, :50] = 1
    send_stage(BatchImages(tmp_path, config), [((images, masks), None)], "train")
    grid = np.asarray(Image.open(tmp_path / "train_batch.png"))
    assert grid.shape == (104 + 16, 2 * 104, 3)
    assert grid[2, 2].tolist() == (class_colors(None, 4)[1] / 2).round().tolist()
    assert grid[99, 2].tolist() == [0, 0, 0]
    assert (grid[104:] == class_colors(None, 4)[3]).all(-1).any()


def test_batch_images_of_tables_draw_nothing(tmp_path: Path, named: dict[str, Any]) -> None:
    batch = (torch.zeros(4, 7), torch.zeros(4))
    send_stage(BatchImages(tmp_path, named), [(batch, None)], "train")
    assert not list(tmp_path.iterdir())


def test_denormalized_images_without_known_statistics_are_stretched() -> None:
    images = torch.tensor([-3.0, 5.0]).view(2, 1, 1, 1)
    auto = {"mean": "auto", "std": "auto"}
    assert denormalize(images, auto)[:, :, 0, 0].tolist() == [[0.0] * 3, [1.0] * 3]
    assert denormalize(images, None)[:, :, 0, 0].tolist() == [[0.0] * 3, [1.0] * 3]


def test_long_and_unusual_captions_fit(tmp_path: Path) -> None:
    grid = draw_captioned_images(torch.zeros(2, 3, 4, 4), ["x" * 300, "кот\n猫 \x1b[1m"])
    grid.save(tmp_path / "grid.png")
    assert grid.size == (2 * 100, 114)
