"""Out-of-memory errors, raised by a task that allocates much for large batches."""

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
from tests.support.processes import SUPPORT_DIR, assert_equal_runs, status_of
from tests.support.runs import RunResult, config_issues, job_for
from tests.support.sweeps import RunSweep

TASK = (
    "task._target_=faulty.MemoryHungryTask",
    "trusted_targets=[faulty]",
    "model=cnn",
    "~callbacks.plots",
)
FEW_BATCHES = (
    "trainer.max_epochs=2",
    "trainer.limit_train_batches=2",
    "trainer.limit_valid_batches=1",
)
SHORT = (*TASK, *FEW_BATCHES, "trainer.limit_test_batches=1", "find.batches=1")
SEARCH = ("+task.largest=32", "+task.pause=0.1", "trainer.limit_train_batches=8")


@pytest.fixture(autouse=True)
def importable_support(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SUPPORT_DIR)


@pytest.mark.parametrize(
    ("overrides", "where", "suggestion"),
    [
        (("data.batch_size=48", "data.eval_batch_size=8"),
         "train, epoch 1, step 1: data.batch_size=48,",
         "data.batch_size=24 with trainer.accumulate_grad_batches=2, trainer.precision=bf16, "),
        (("data.batch_size=8", "data.eval_batch_size=40"),
         "valid, epoch 1, step 1: data.batch_size=8, data.eval_batch_size=40,",
         "data.eval_batch_size=20"),
    ],
)  # fmt: skip
def test_out_of_memory_error_names_step_batch_size_and_suggestion(
    tmp_path: Path, overrides: tuple[str, ...], where: str, suggestion: str
) -> None:
    job = job_for(*SHORT, "+task.largest=32", "trainer.sanity_valid_batches=0", *overrides)
    with pytest.raises(UserError) as raised:
        execute(job, tmp_path)
    text = str(raised.value)
    assert text.startswith(f"out of memory in {where} at most ")
    assert suggestion in text
    assert "MiB in use by the process so far" in text
    assert isinstance(raised.value.__cause__, RuntimeError)
    assert status_of(tmp_path)["status"] == "failed"


def test_out_of_memory_in_prediction_names_the_step(tmp_path: Path) -> None:
    execute(job_for(*SHORT, "data.batch_size=8"), tmp_path / "run")
    overrides = (
        "mode=predict",
        f"ckpt={tmp_path / 'run'}",
        "data.batch_size=64",
        "+task.largest=32",
    )
    with pytest.raises(UserError, match=r"out of memory in predict, epoch \d, step 1: data.batch"):
        execute(job_for(*overrides, "trusted_targets=[faulty]"), tmp_path / "predicted")


def test_out_of_memory_in_a_sweep_fails_only_that_job(sweep: RunSweep, tmp_path: Path) -> None:
    overrides = (*SHORT, "+task.largest=32", "data.batch_size=48,16", "hydra.sweep.dir=s")
    assert sweep(*overrides, "trainer.sanity_valid_batches=0", short=False) == 1
    table = pd.read_csv(tmp_path / "s" / "sweep.csv")
    assert table["status"].tolist() == ["failed", "completed"]
    assert table["error"][0].startswith("UserError: out of memory in train, epoch 1, step 1")
    log = next((tmp_path / "s").glob("0_*")) / "run.log"
    assert "can't allocate memory" in log.read_text()
    assert "Traceback" in log.read_text()


def run_and_read_config(job: Job, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    execute(job, folder)
    config: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text())
    return config


def test_batch_size_finder_trains_as_if_started_with_the_size_it_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    overrides = (*SHORT, *SEARCH, "data.batch_size=8")
    searched = (*overrides, "trainer.batch_size_finder=true")
    with caplog.at_level(logging.INFO):
        config = run_and_read_config(job_for(*searched), tmp_path / "searched")
    tried = pd.read_csv(tmp_path / "searched" / "find_batch_size.csv")
    size = config["data"]["batch_size"]
    assert tried["batch_size"].tolist() == [8, 16, 32]  # 64 does not fit
    assert size == tried["batch_size"][tried["samples/s"].argmax()] > 8
    assert f"training runs with data.batch_size={size}" in caplog.text
    rows = pd.read_csv(tmp_path / "searched" / "epoch_details" / "epoch001_train.csv")
    assert rows["num_samples"].tolist() == [size] * 8

    last = load_checkpoint(tmp_path / "searched" / "checkpoints" / "last.safetensors")
    assert last.config is not None
    assert last.config["data"]["batch_size"] == size

    execute(job_for(*overrides, f"data.batch_size={size}"), tmp_path / "plain")
    (tmp_path / "searched" / "find_batch_size.csv").unlink()
    assert_equal_runs(tmp_path / "plain", tmp_path / "searched")


def test_resume_keeps_the_batch_size_and_does_not_search_again(
    app: Callable[..., RunResult], tmp_path: Path
) -> None:
    overrides = (*SHORT, *SEARCH, "data.batch_size=8", "trainer.batch_size_finder=true")
    overrides = (*overrides, "scheduler=constant", "resume=auto", "hydra.run.dir=run")
    assert app(*overrides, "find.batch_size_to=16").code == 0
    folder = tmp_path / "run"
    size = yaml.safe_load((folder / "config.yaml").read_text())["data"]["batch_size"]
    table = folder / "find_batch_size.csv"
    before = table.read_text()
    (folder / "status.json").unlink()  # so that the run is not complete
    assert app(*overrides, "find.batch_size_to=16", "trainer.max_epochs=3").code == 0
    assert table.read_text() == before
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["batch_size"] == size
    rows = pd.read_csv(folder / "epoch_details" / "epoch003_train.csv")
    assert rows["num_samples"].tolist() == [size] * 8


def test_batch_size_finder_with_first_size_too_large_is_rejected(tmp_path: Path) -> None:
    overrides = (*SHORT, "+task.largest=4", "data.batch_size=8", "trainer.batch_size_finder=true")
    with pytest.raises(UserError, match=r"data\.batch_size=8 does not fit into memory"):
        execute(job_for(*overrides), tmp_path)


def test_config_with_batch_size_finder_on_several_devices_is_rejected() -> None:
    (issue,) = config_issues("trainer.batch_size_finder=true", "trainer.devices=2")
    assert issue.startswith("trainer.batch_size_finder=True searches on one device, but")
