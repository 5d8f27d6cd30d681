"""The tutorial docs/my_pictures.md works as it is written, on the pictures that it draws."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from safetensors import safe_open

from tests.support.runs import RunResult

PAGE = (Path(__file__).parents[2] / "docs" / "my_pictures.md").read_text()
TUTORIAL, _, MASKS = PAGE.partition("## Masks")
NAMES = ["circle", "square", "triangle"]


def test_tutorial_runs_from_a_folder_to_an_exported_model(
    app: Callable[..., RunResult], tmp_cwd: Path
) -> None:
    (script,) = re.findall(r"```python\n(.*?)```", TUTORIAL, re.DOTALL)
    exec(script)
    commands = re.findall(r"^python -m app (.*)$", TUTORIAL, re.MULTILINE)
    assert len(commands) == 7
    check, train, test, predict, export, check_transforms, cached = map(shlex.split, commands)
    for command in (check, check_transforms):
        checked = app(*command)
        assert (checked.code, checked.out) == (0, "the configuration is valid\n"), checked.err
    assert not (tmp_cwd / "outputs").exists()

    assert app(*cached, "trainer.fast_dev_run=true").code == 0
    assert len(list((tmp_cwd / "datasets" / "cache").glob("*.safetensors"))) >= 1
    trained = app(*train, "trainer.max_epochs=2", "data.loader.num_workers=0")
    assert trained.code == 0, trained.err
    folder = tmp_cwd / "outputs" / "shapes3"
    assert "is read as one folder of classes" in (folder / "run.log").read_text()
    for name in ("train_batch.png", "valid_batch.png", "plots/test_confusion_matrix.png"):
        assert (folder / name).stat().st_size > 1000
    assert (folder / "plots/test_confusion_matrix_normalized.png").exists()
    summary = pd.read_csv(folder / "test_summary_table.csv")
    assert summary["total_samples"].tolist() == [18]
    (details,) = (folder / "epoch_details").glob("*_test_confusion_matrix.csv")
    assert list(pd.read_csv(details).columns) == NAMES
    (file,) = (folder / "predictions").glob("*_test/predictions.csv")
    predictions = pd.read_csv(file)
    assert [path.split("/")[0] for path in predictions["path"]] == [*predictions["target_name"]]
    assert predictions["target_name"].value_counts().tolist() == [6, 6, 6]

    tested = app(*test)
    assert tested.code == 0, tested.err
    (again,) = tmp_cwd.glob("outputs/2*/*_test_*/test_summary_table.csv")
    columns = ["accuracy", "loss_mean", "total_samples"]
    assert pd.read_csv(again)[columns].equals(summary[columns])

    assert app(*predict).code == 0
    (file,) = tmp_cwd.glob("outputs/2*/*_predict_*/predictions.csv")
    labels = pd.read_csv(file)
    assert labels["sample"].tolist() == [f"{number:03}.png" for number in range(60)]
    shared = predictions[predictions["target_name"] == "circle"]
    for path, label in zip(shared["path"], shared["label_name"], strict=True):
        row = labels[labels["sample"] == path.split("/")[1]]
        assert row["label_name"].tolist() == [label]

    assert app(*export).code == 0
    (file,) = tmp_cwd.glob("outputs/2*/*_export_*/model.safetensors")
    with safe_open(file, "pt") as exported:
        assert exported.metadata()["class_names"] == '["circle", "square", "triangle"]'


def test_masks_run_from_folders_to_predicted_masks(
    app: Callable[..., RunResult], tmp_cwd: Path
) -> None:
    (script,) = re.findall(r"```python\n(.*?)```", MASKS, re.DOTALL)
    exec(script)
    commands = re.findall(r"^python -m app (.*)$", MASKS, re.MULTILINE)
    check, check_colors, train, test, predict_test, predict_images = map(shlex.split, commands)
    for command in (check, check_colors):
        checked = app(*command)
        assert (checked.code, checked.out) == (0, "the configuration is valid\n"), checked.err
    assert not (tmp_cwd / "outputs").exists()

    trained = app(*train, "trainer.max_epochs=1", "data.loader.num_workers=0")
    assert trained.code == 0, trained.err
    folder = tmp_cwd / "outputs" / "masks"
    for name in (
        "train_batch.png",
        "valid_batch.png",
        "samples/epoch001_valid.png",
        "plots/test_iou_per_class.png",
    ):
        assert (folder / name).stat().st_size > 1000
    details = folder / "epoch_details"
    names = ["background", "circle", "rectangle"]
    assert list(pd.read_csv(details / "epoch001_test_iou_per_class.csv").columns) == names

    assert app(*test).code == 0
    (again,) = tmp_cwd.glob("outputs/2*/*_test_*/test_summary_table.csv")
    summary = pd.read_csv(folder / "test_summary_table.csv")
    columns = ["loss_mean", "mean_iou", "dice", "instance_iou", "total_samples"]
    assert pd.read_csv(again)[columns].equals(summary[columns])

    for command in (predict_test, predict_images):
        predicted = app(*command)
        assert predicted.code == 0, predicted.err
    of_stage, of_folder = sorted(tmp_cwd.glob("outputs/2*/*_predict_*/predictions"))
    files = sorted((of_stage / "images").glob("*.png"))
    assert len(files) == 20
    confusion = np.zeros((3, 3), np.int64)
    for file in files:
        labels = np.asarray(Image.open(file))
        assert np.array_equal(labels, np.asarray(Image.open(of_folder / file.name)))
        target = np.asarray(Image.open(tmp_cwd / "shapes_masks" / "masks" / file.name))
        np.add.at(confusion, (target, labels), 1)
    saved = pd.read_csv(details / "epoch001_test_confusion_matrix.csv")
    assert saved.to_numpy().tolist() == confusion.tolist()
    assert len(list(of_folder.glob("*.png"))) == 200
