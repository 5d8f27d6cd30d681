"""Too little memory, for real: a model that asks for absurdly much where a batch is large."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from app.config.schema import Job
from app.experiment.run import execute
from app.runtime.errors import UserError
from app.training.checkpoint.checkpoint import load_checkpoint
from tests.support.processes import TESTS, assert_equal_runs, status_of
from tests.support.runs import Ran, job_for, mistakes_in
from tests.support.sweeps import Sweeps

TASK = ("task._target_=faulty.Greedy", "trusted_targets=[faulty]", "model=cnn", "~callbacks.plots")
FEW = ("trainer.max_epochs=2", "trainer.limit_train_batches=2", "trainer.limit_valid_batches=1")
SHORT = (*TASK, *FEW, "trainer.limit_test_batches=1", "find.batches=1")
SEARCHED = ("+task.largest=32", "+task.pause=0.1", "trainer.limit_train_batches=8")


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(TESTS)


@pytest.mark.parametrize(
    ("words", "where", "way_out"),
    [
        (("data.batch_size=48", "data.eval_batch_size=8"),
         "train, epoch 1, step 1: data.batch_size=48,",
         "data.batch_size=24 with trainer.accumulate_grad_batches=2, trainer.precision=bf16, "),
        (("data.batch_size=8", "data.eval_batch_size=40"),
         "valid, epoch 1, step 1: data.batch_size=8, data.eval_batch_size=40,",
         "data.eval_batch_size=20"),
    ],
)  # fmt: skip
def test_it_is_one_error_that_names_all(
    tmp_path: Path, words: tuple[str, ...], where: str, way_out: str
) -> None:
    job = job_for(*SHORT, "+task.largest=32", "trainer.sanity_valid_batches=0", *words)
    with pytest.raises(UserError) as raised:
        execute(job, tmp_path)
    text = str(raised.value)
    assert text.startswith(f"out of memory in {where} at most ")
    assert way_out in text
    assert "MiB in use by the process so far" in text
    assert isinstance(raised.value.__cause__, RuntimeError)
    assert status_of(tmp_path)["status"] == "failed"


def test_in_prediction_too(tmp_path: Path) -> None:
    execute(job_for(*SHORT, "data.batch_size=8"), tmp_path / "run")
    words = ("mode=predict", f"ckpt={tmp_path / 'run'}", "data.batch_size=64", "+task.largest=32")
    with pytest.raises(UserError, match=r"out of memory in predict, epoch \d, step 1: data.batch"):
        execute(job_for(*words, "trusted_targets=[faulty]"), tmp_path / "predicted")


def test_in_a_sweep_that_job_alone_fails(sweep: Sweeps, tmp_path: Path) -> None:
    words = (*SHORT, "+task.largest=32", "data.batch_size=48,16", "hydra.sweep.dir=s")
    assert sweep(*words, "trainer.sanity_valid_batches=0", short=False) == 1
    table = pd.read_csv(tmp_path / "s" / "sweep.csv")
    assert table["status"].tolist() == ["failed", "completed"]
    assert table["error"][0].startswith("UserError: out of memory in train, epoch 1, step 1")
    log = next((tmp_path / "s").glob("0_*")) / "run.log"
    assert "can't allocate memory" in log.read_text()
    assert "Traceback" in log.read_text()


# ---- the batch size that is found


def found_by(job: Job, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    execute(job, folder)
    config: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text())
    return config


def test_training_runs_with_the_size_found_as_if_nothing_had_been_tried(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = (*SHORT, *SEARCHED, "data.batch_size=8")
    searched = (*words, "trainer.batch_size_finder=true")
    with caplog.at_level(logging.INFO):
        config = found_by(job_for(*searched), tmp_path / "searched")
    tried = pd.read_csv(tmp_path / "searched" / "find_batch_size.csv")
    size = config["data"]["batch_size"]
    assert tried["batch_size"].tolist() == [8, 16, 32]  # 64 does not fit
    assert size == tried["batch_size"][tried["samples/s"].argmax()] > 8
    assert f"training runs with data.batch_size={size}" in caplog.text
    rows = pd.read_csv(tmp_path / "searched" / "epoch_details" / "epoch001_train.csv")
    assert rows["num_samples"].tolist() == [size] * 8

    last = load_checkpoint(tmp_path / "searched" / "checkpoints" / "last.pt")
    assert last.config is not None
    assert last.config["data"]["batch_size"] == size
    assert yaml.safe_load(str(last.template))["data"]["batch_size"] == size

    execute(job_for(*words, f"data.batch_size={size}"), tmp_path / "plain")
    (tmp_path / "searched" / "find_batch_size.csv").unlink()
    assert_equal_runs(tmp_path / "plain", tmp_path / "searched")


def test_a_run_that_goes_on_keeps_the_size_and_does_not_search_again(
    app: Callable[..., Ran], tmp_path: Path
) -> None:
    words = (*SHORT, *SEARCHED, "data.batch_size=8", "trainer.batch_size_finder=true")
    words = (*words, "scheduler=constant", "resume=auto", "hydra.run.dir=run")
    assert app(*words, "find.batch_size_to=16").code == 0
    folder = tmp_path / "run"
    size = yaml.safe_load((folder / "config.yaml").read_text())["data"]["batch_size"]
    table = folder / "find_batch_size.csv"
    before = table.read_text()
    (folder / "status.json").unlink()  # else it is complete
    assert app(*words, "find.batch_size_to=16", "trainer.max_epochs=3").code == 0
    assert table.read_text() == before
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["batch_size"] == size
    rows = pd.read_csv(folder / "epoch_details" / "epoch003_train.csv")
    assert rows["num_samples"].tolist() == [size] * 8


def test_a_size_that_does_not_fit_at_all(tmp_path: Path) -> None:
    words = (*SHORT, "+task.largest=4", "data.batch_size=8", "trainer.batch_size_finder=true")
    with pytest.raises(UserError, match=r"data\.batch_size=8 does not fit into memory"):
        execute(job_for(*words), tmp_path)


def test_several_devices_are_refused() -> None:
    (mistake,) = mistakes_in("trainer.batch_size_finder=true", "trainer.devices=2")
    assert mistake.startswith("trainer.batch_size_finder=True searches on one device, but")
