"""Predictions of datasets and image folders with mode=predict."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from app.config.instantiate import Instantiator
from app.data.mnist import mnist
from app.experiment.factory import make_model
from app.experiment.run import execute
from app.metrics.segmentation import MeanIoU
from app.runtime.errors import UserError
from tests.support.data_files import write_data
from tests.support.image_files import write_mask_folder
from tests.support.runs import RunResult, config_issues, job_for


def trained_model(trained_run: RunResult) -> nn.Module:
    model = make_model(job_for("model=mlp").config, Instantiator(), torch.device("cpu"))
    model.load_state_dict(torch.load(trained_run.folder / "model.pt", weights_only=True))
    return model.eval()


def mnist_test_images() -> torch.Tensor:
    pixels: torch.Tensor = mnist(train=False).tensors[0]
    return pixels


def expected_probabilities(trained_run: RunResult, pixels: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        outputs = trained_model(trained_run)((pixels.float() / 255 - 0.1307) / 0.3081)
    probabilities: np.ndarray = outputs.softmax(1).numpy()
    return probabilities


def test_predict_dataset_writes_labels_and_probabilities(
    trained_run: RunResult, tmp_path: Path
) -> None:
    job = job_for("mode=predict", f"ckpt={trained_run.folder}", "trainer.limit_test_batches=null")
    execute(job, tmp_path)
    table = pd.read_csv(tmp_path / "predictions.csv")
    probabilities = expected_probabilities(trained_run, mnist_test_images())
    columns = [f"probability_{k}" for k in range(10)]
    np.testing.assert_allclose(table[columns], probabilities, atol=1e-6)
    assert table["label"].tolist() == probabilities.argmax(1).tolist()
    assert table["target"].tolist() == mnist(train=False).tensors[1].tolist()
    accuracy = pd.read_csv(trained_run.folder / "test_summary_table.csv")["accuracy"][0]
    assert (table["label"] == table["target"]).mean() == accuracy


def test_predict_stage_covers_all_its_samples(
    trained_run: RunResult, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    overrides = (
        "mode=predict",
        f"ckpt={trained_run.folder}",
        "predict.stage=valid",
        "data.batch_size=7",
    )
    with caplog.at_level(logging.INFO):
        execute(job_for(*overrides), tmp_path)
    assert len(pd.read_csv(tmp_path / "predictions.csv")) == 5000
    assert caplog.messages[-1].endswith(f" are in {tmp_path / 'predictions.csv'}")


def test_predict_image_folder_converts_format_and_size(
    trained_run: RunResult, tmp_path: Path
) -> None:
    folder = tmp_path / "digits"
    (folder / "more").mkdir(parents=True)
    digits = mnist_test_images()[:3, 0].numpy()
    Image.fromarray(digits[0]).save(folder / "a.png")
    Image.fromarray(digits[1]).convert("RGB").save(folder / "b.bmp")
    Image.fromarray(digits[2]).resize((56, 56), Image.Resampling.NEAREST).save(
        folder / "more/c.png"
    )
    (folder / "notes.txt").write_text("no image")
    overrides = ("mode=predict", f"ckpt={trained_run.folder}", f"predict.images={folder}")
    execute(job_for(*overrides), tmp_path / "run")
    table = pd.read_csv(tmp_path / "run" / "predictions.csv")
    assert table["sample"].tolist() == ["a.png", "b.bmp", "more/c.png"]
    assert "target" not in table
    probabilities = expected_probabilities(trained_run, mnist_test_images()[:2])
    np.testing.assert_allclose(table.filter(like="probability")[:2], probabilities, atol=1e-5)
    assert (
        table["label"][2] == expected_probabilities(trained_run, mnist_test_images()[2:3]).argmax()
    )


def test_predict_with_invalid_settings_raises(trained_run: RunResult, tmp_path: Path) -> None:
    (issue,) = config_issues("mode=predict")
    assert issue.startswith("ckpt has no value: mode=predict needs")
    ckpt = f"ckpt={trained_run.folder}"
    for value, message in (("nowhere", "is not a folder"), (str(tmp_path), "contains no image")):
        with pytest.raises(UserError, match=f"predict.images='{value}' {message}"):
            execute(job_for("mode=predict", ckpt, f"predict.images={value}"), tmp_path / "run")
    with pytest.raises(UserError, match=r"predict\.images: x+ cannot be read: File name too long"):
        execute(job_for("mode=predict", ckpt, f"predict.images={300 * 'x'}"), tmp_path / "run")
    (issue,) = config_issues("mode=predict", ckpt, "predict.stage=tests")
    assert "did you mean 'test'" in issue
    with pytest.raises(UserError, match=r"format='png' does not fit outputs of shape"):
        execute(job_for("mode=predict", ckpt, "predict.format=png"), tmp_path / "png")


def test_predict_ignores_the_batch_limits_of_the_training_run(tmp_path: Path) -> None:
    execute(job_for("model=mlp", "debug=fast", "~callbacks.plots"), tmp_path / "run")
    execute(job_for("mode=predict", f"ckpt={tmp_path / 'run'}"), tmp_path / "all")
    assert len(pd.read_csv(tmp_path / "all" / "predictions.csv")) == 10_000


@pytest.mark.parametrize("name", ["image_folder", "masks"])
def test_predict_from_a_checkpoint_alone_repeats_the_test_metrics(name: str, tmp_cwd: Path) -> None:
    """Also without the cache that the training had."""
    model = ["model=mlp"] if name == "image_folder" else []
    options = (f"data={name}", *write_data(name, tmp_cwd), *model, "callbacks={}")
    execute(job_for(*options, "trainer.max_epochs=2", "data.cache=disk"), tmp_cwd / "run")
    metrics = pd.read_csv(tmp_cwd / "run" / "test_summary_table.csv").iloc[-1]
    shutil.move(tmp_cwd / "run" / "checkpoints" / "best.safetensors", "alone.safetensors")
    shutil.rmtree(tmp_cwd / "run")
    shutil.rmtree(tmp_cwd / "datasets")
    alone = ("ckpt=alone.safetensors", "data.cache=null")
    execute(job_for("mode=test", *alone), tmp_cwd / "tested")
    execute(job_for("mode=predict", *alone, "predict.stage=test"), tmp_cwd / "predicted")

    tested = pd.read_csv(tmp_cwd / "tested" / "test_summary_table.csv").iloc[-1]
    same = [key for key in metrics.index if "time" not in key and key not in ("epoch", "samples/s")]
    assert tested[same].equals(metrics[same])
    if name == "image_folder":
        table = pd.read_csv(tmp_cwd / "predicted" / "predictions.csv")
        assert (table["label"] == table["target"]).mean() == metrics["accuracy"]
        return
    metric, files = MeanIoU(3), sorted((tmp_cwd / "predicted").glob("predictions/images/*.png"))
    for file in files:
        labels = torch.from_numpy(np.array(Image.open(file))).long()
        mask = torch.from_numpy(np.array(Image.open(tmp_cwd / "street" / "masks" / file.name)))
        target = v2.functional.resize(tv_tensors.Mask(mask), [16, 16]).long()
        metric.update(F.one_hot(labels, 3).movedim(-1, 0)[None].float(), target[None])
    assert len(files) == metrics["total_samples"]
    assert float(metric.compute()) == np.float32(metrics["mean_iou"])

    write_mask_folder(tmp_cwd / "other", 20)
    Image.fromarray(np.full((32, 32), 7, np.uint8)).save("other/masks/004.png")
    (issue,) = config_issues("mode=test", *alone, "data.path=other")  # before a batch is read
    assert "other/masks/004.png has the label 7; allowed: 0 to 2" in issue
