"""Detection with the command line's components: train, resume, test, predict, several ranks."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from app.distributed.launch.local import launch_local
from app.experiment.entry import run_experiment
from app.experiment.run import execute
from app.runtime.nested import Nested
from app.training.detection import DetectionTask
from app.training.task import StepOutput
from tests.support.fork_server import start_fork_server
from tests.support.image_files import write_coco_folder
from tests.support.processes import SILENT_LOGGING, assert_equal_runs
from tests.support.runs import config_issues, job_for

pytest.importorskip("pycocotools")
TINY = (  # six training steps and two evaluation steps per epoch
    "experiment=shapes_detection",
    "data.source.train.count=30",
    "data.source.test.count=7",
    "data.split.valid=7",
    "data.image_size=32",
    "data.batch_size=4",
    "model.channels=[8,32]",
    "optimizer.lr=0.02",
    "trainer.accelerator=cpu",
    "~callbacks.plots",
)
METRICS = ["total_samples", "map", "map_50", "map_75"]


def run_job(folder: Path, *overrides: str, size: int = 1) -> Path:
    """Run a job in a folder, and resume it if it exists."""
    job = job_for(f"hydra.run.dir={folder}", f"trainer.devices={size}", *overrides)
    folder.mkdir(exist_ok=True)
    if size == 1:
        execute(job, folder)
    else:
        start_fork_server()
        launch_local(run_experiment, job, folder, size, SILENT_LOGGING)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a training of three epochs."""
    return run_job(tmp_path_factory.mktemp("detection") / "run", *TINY, "trainer.max_epochs=3")


def test_training_writes_losses_metrics_and_drawings(trained: Path) -> None:
    table = pd.read_csv(trained / "summary_table.csv")
    train, valid = table[table["stage"] == "train"], table[table["stage"] == "valid"]
    losses = ["classification", "bbox_regression", "bbox_ctrness"]
    np.testing.assert_allclose(train["loss_mean"], train[losses].sum(axis=1), rtol=1e-5)
    assert train["loss_mean"].iloc[-1] < train["loss_mean"].iloc[0]
    assert valid["loss_mean"].isna().all()
    assert valid[METRICS].notna().all(axis=None)
    assert (trained / "samples/epoch003_valid.png").exists()
    assert (trained / "train_batch.png").exists()
    (per_class,) = (trained / "epoch_details").glob("*_test_map_per_class.csv")
    assert [*pd.read_csv(per_class)] == ["circle", "rectangle"]
    assert "not finite" not in (trained / "status.json").read_text()


@pytest.mark.parametrize("size", [1, 2])
def test_test_of_checkpoint_equals_that_of_training(
    trained: Path, tmp_path: Path, size: int
) -> None:
    folder = run_job(tmp_path / "test", "mode=test", f"ckpt={trained}", size=size)
    tables = [pd.read_csv(run / "test_summary_table.csv")[METRICS] for run in (trained, folder)]
    pd.testing.assert_frame_equal(*tables)


def test_interrupted_training_resumes_exactly(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, train_step = itertools.count(1), DetectionTask.train_step

    def fail_in_second_epoch(task: DetectionTask, batch: Nested) -> StepOutput:
        assert next(steps) != 9, "injected failure"
        return train_step(task, batch)

    options = (*TINY, "trainer.max_epochs=3", "checkpoint.every_n_steps=1")
    with monkeypatch.context() as patch:
        patch.setattr(DetectionTask, "train_step", fail_in_second_epoch)
        with pytest.raises(AssertionError, match="injected failure"):
            run_job(tmp_path / "run", *options)
    run_job(tmp_path / "run", f"resume={tmp_path / 'run'}")
    assert_equal_runs(trained, tmp_path / "run")


def test_two_ranks_train(tmp_path: Path) -> None:
    folder = run_job(tmp_path / "run", *TINY, "trainer.max_epochs=1", size=2)
    row = pd.read_csv(folder / "train_summary_table.csv").iloc[0]
    assert row["total_samples"] == 23
    weights = torch.load(folder / "model.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_folder_of_pictures_is_trained_on_and_predicted(tmp_path: Path) -> None:
    write_coco_folder(tmp_path / "street", 12, 40)
    job = (f"data.path={tmp_path / 'street'}", "data=coco", "data.loader.num_workers=0")
    options = [text for text in TINY if not text.startswith(("data.source", "data.split"))]
    augment = "+data.augment.jitter={_target_: app.data.augment.ColorJitter, brightness: 0.2}"
    run = run_job(tmp_path / "run", *options, *job, augment, "trainer.max_epochs=1")
    stage = run_job(tmp_path / "stage", "mode=predict", f"ckpt={run}", "predict.stage=train")
    shutil.copytree(tmp_path / "street/images", tmp_path / "images")
    images = run_job(
        tmp_path / "folder", "mode=predict", f"ckpt={run}", f"predict.images={tmp_path / 'images'}"
    )
    by_stage, by_name = (pd.read_csv(f / "predictions.csv") for f in (stage, images))
    by_stage["name"] = by_stage["path"].str.removeprefix("images/")
    boxes = ["label", "score", "x1", "y1", "x2", "y2"]
    assert len(by_stage)
    for name, found in by_stage.groupby("name"):
        expected = by_name[by_name["sample"] == name]
        np.testing.assert_allclose(found[boxes], expected[boxes], rtol=1e-3, atol=1e-3)
    (issue,) = config_issues("mode=export", f"ckpt={run}", "export.format=onnx")
    assert issue.startswith("export.format='onnx': the number of boxes depends on the image")
    exported = run_job(tmp_path / "exported", "mode=export", f"ckpt={run}")
    assert (exported / "model.safetensors").exists()
