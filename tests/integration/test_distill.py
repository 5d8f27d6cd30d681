"""Runs that learn from a teacher: resumed, evaluated and exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

from app.config.schema import Job
from app.experiment.run import execute
from app.runtime.errors import UserError
from app.training.checkpoint.checkpoint import load_checkpoint
from tests.support.runs import job_for
from tests.support.teachers import DISTILL, train_teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a trained run."""
    return train_teacher(tmp_path_factory.mktemp("teacher"))


def run_job(job: Job, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    execute(job, folder)
    return folder


def last_weights(folder: Path) -> dict[str, Tensor]:
    return load_checkpoint(folder / "checkpoints" / "last.safetensors").model


def test_distilled_run_resumes_exactly_and_is_used_without_its_teacher(
    teacher: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(teacher, tmp_path / "source")
    distill = (*DISTILL, f"teacher={source}")
    whole = run_job(job_for(*distill, "trainer.max_epochs=2"), tmp_path / "whole")
    run = run_job(job_for(*distill, "trainer.max_epochs=1"), tmp_path / "run")
    resume = (f"resume={run}", f"hydra.run.dir={run}")
    with pytest.raises(UserError, match=r"teacher: .* cannot be changed"):
        job_for(*resume, f"teacher={teacher}")
    job = job_for(*resume, "trainer.max_epochs=2")
    run_job(job, run)
    torch.testing.assert_close(last_weights(run), last_weights(whole), rtol=0, atol=0)
    assert last_weights(run).keys() == {
        f"layers.{n}.{p}" for n in (1, 3) for p in ("weight", "bias")
    }
    train = pd.read_csv(run / "train_summary_table.csv")
    total = 0.1 * train["task_loss"] + 0.9 * train["distillation_loss"]
    torch.testing.assert_close(torch.tensor(total), torch.tensor(train["loss_mean"]))
    record = json.loads((run / "environment.json").read_text())["attempts"][-1]["teacher"]
    assert record["checkpoint"] == str(source / "checkpoints" / "best.safetensors")
    assert job.plain["teacher"] == str(source)

    shutil.rmtree(source)
    for mode in ("test", "valid", "predict", "export"):
        run_job(job_for(f"mode={mode}", f"ckpt={run}"), tmp_path / mode)
    assert len(pd.read_csv(tmp_path / "valid" / "valid_summary_table.csv")) == 1
    with pytest.raises(UserError, match=r"teacher='.*source' does not exist; .* also to resume"):
        job_for(*resume, "trainer.max_epochs=3")


def test_run_that_resumes_with_another_teacher_says_so(
    teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = shutil.copytree(teacher, tmp_path / "source")
    few = (*DISTILL, f"teacher={source}", "trainer.max_epochs=1")
    run = run_job(job_for(*few), tmp_path / "run")
    checkpoints = source / "checkpoints"
    shutil.copy(checkpoints / "last.safetensors", checkpoints / "best.safetensors")
    run_job(job_for(f"resume={run}", f"hydra.run.dir={run}", "trainer.max_epochs=2"), run)
    assert "best.safetensors has changed since the run was started" in caplog.text
