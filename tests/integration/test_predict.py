"""mode=predict, and the files of predictions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from app.config.instantiate import Instantiator
from app.data.mnist import mnist
from app.experiment.factory import make_model
from app.experiment.run import execute
from app.runtime.errors import UserError
from tests.support.runs import RunResult, job_for, config_issues


def trained_model(trained_run: RunResult) -> nn.Module:
    model = make_model(job_for("model=mlp").config, Instantiator(), torch.device("cpu"))
    model.load_state_dict(torch.load(trained_run.folder / "model.pt", weights_only=True))
    return model.eval()


def images() -> torch.Tensor:
    pixels: torch.Tensor = mnist(train=False).tensors[0]
    return pixels


def expected(trained_run: RunResult, pixels: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        outputs = trained_model(trained_run)((pixels.float() / 255 - 0.1307) / 0.3081)
    shares: np.ndarray = outputs.softmax(1).numpy()
    return shares


def test_labels_and_probabilities_of_a_dataset(trained_run: RunResult, tmp_path: Path) -> None:
    job = job_for("mode=predict", f"ckpt={trained_run.folder}", "trainer.limit_test_batches=null")
    execute(job, tmp_path)
    found = pd.read_csv(tmp_path / "predictions.csv")
    shares = expected(trained_run, images())
    columns = [f"probability_{k}" for k in range(10)]
    np.testing.assert_allclose(found[columns], shares, atol=1e-6)
    assert found["label"].tolist() == shares.argmax(1).tolist()
    assert found["target"].tolist() == mnist(train=False).tensors[1].tolist()
    accuracy = pd.read_csv(trained_run.folder / "test_summary_table.csv")["accuracy"][0]
    assert (found["label"] == found["target"]).mean() == accuracy


def test_another_stage_is_predicted_in_the_order_of_its_data(trained_run: RunResult, tmp_path: Path) -> None:
    words = ("mode=predict", f"ckpt={trained_run.folder}", "predict.stage=valid", "data.batch_size=7")
    execute(job_for(*words), tmp_path)
    assert len(pd.read_csv(tmp_path / "predictions.csv")) == 5000


def test_a_folder_of_images_of_any_kind(trained_run: RunResult, tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    (folder / "more").mkdir(parents=True)
    digits = images()[:3, 0].numpy()
    Image.fromarray(digits[0]).save(folder / "a.png")
    Image.fromarray(digits[1]).convert("RGB").save(folder / "b.bmp")
    Image.fromarray(digits[2]).resize((56, 56), Image.Resampling.NEAREST).save(
        folder / "more/c.png"
    )
    (folder / "notes.txt").write_text("no image")
    words = ("mode=predict", f"ckpt={trained_run.folder}", f"predict.images={folder}")
    execute(job_for(*words), tmp_path / "run")
    found = pd.read_csv(tmp_path / "run" / "predictions.csv")
    assert found["sample"].tolist() == ["a.png", "b.bmp", "more/c.png"]
    assert "target" not in found
    shares = expected(trained_run, images()[:2])
    np.testing.assert_allclose(found.filter(like="probability")[:2], shares, atol=1e-5)
    assert found["label"][2] == expected(trained_run, images()[2:3]).argmax()


def test_predicting_with_nothing_to_predict(trained_run: RunResult, tmp_path: Path) -> None:
    (mistake,) = config_issues("mode=predict")
    assert mistake.startswith("ckpt has no value: mode=predict needs")
    ckpt = f"ckpt={trained_run.folder}"
    for value, message in (("nowhere", "is not a folder"), (str(tmp_path), "contains no image")):
        with pytest.raises(UserError, match=f"predict.images='{value}' {message}"):
            execute(job_for("mode=predict", ckpt, f"predict.images={value}"), tmp_path / "run")
    with pytest.raises(UserError, match=r"predict\.images: x+ cannot be read: File name too long"):
        execute(job_for("mode=predict", ckpt, f"predict.images={300 * 'x'}"), tmp_path / "run")
    (mistake,) = config_issues("mode=predict", ckpt, "predict.stage=tests")
    assert "did you mean 'test'" in mistake
    with pytest.raises(UserError, match=r"format='png' does not fit outputs of shape"):
        execute(job_for("mode=predict", ckpt, "predict.format=png"), tmp_path / "png")


def test_everything_is_predicted_whatever_the_run_was_limited_to(tmp_path: Path) -> None:
    execute(job_for("model=mlp", "debug=fast"), tmp_path / "run")
    execute(job_for("mode=predict", f"ckpt={tmp_path / 'run'}"), tmp_path / "all")
    assert len(pd.read_csv(tmp_path / "all" / "predictions.csv")) == 10_000
