"""The best weights: kept, lost, or newer than the checkpoint that the run resumes from."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from app.runtime.signals import TrainingInterrupted
from app.training.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from tests.support.interrupted_runs import RunJob, job_runner
from tests.support.processes import assert_equal_runs

KEEP = ("checkpoint.keep_last=3", "checkpoint.save_top_k=2", "trainer.max_epochs=2")
FIRST_IS_BEST = (  # the first epoch has the highest loss
    "goal.metric=train/loss",
    "goal.mode=max",
    "checkpoint.save_top_k=1",
    "+checkpoint.monitors.worst={metric: train/loss, mode: max}",
)


@pytest.fixture
def run_job(tmp_path: Path) -> Iterator[RunJob]:
    with job_runner(tmp_path) as run_job:
        yield run_job


def test_save_top_k_keeps_weights_of_best_epochs(run_job: RunJob) -> None:
    folder = run_job("run", "none:0:0", "checkpoint.save_top_k=2", "checkpoint.keep_last=1")
    rows = pd.read_csv(folder / "valid_summary_table.csv")
    ranked = rows.sort_values(["accuracy", "epoch"], ascending=[False, True])["epoch"][:2]
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {
        "best.safetensors",
        "last.safetensors",
        *(f"epoch{epoch:03d}.safetensors" for epoch in ranked),
    }
    best, first = (
        folder / "checkpoints" / n
        for n in ("best.safetensors", f"epoch{ranked.iloc[0]:03d}.safetensors")
    )
    one, other = (load_checkpoint(path) for path in (best, first))
    assert one.epoch == other.epoch == ranked.iloc[0]
    assert all(torch.equal(one.model[name], other.model[name]) for name in one.model)


def test_resume_resaves_missing_best_weights_after_best_epoch(run_job: RunJob) -> None:
    """The checkpoint was saved at the end of the best epoch and has its weights."""
    expected = run_job("uninterrupted", "none:0:0", *KEEP)
    folder = run_job("run", "raise:0:7", *KEEP)
    best, top_k = (
        folder / "checkpoints" / name for name in ("best.safetensors", "epoch001.safetensors")
    )
    best.write_bytes(best.read_bytes()[:-1000])
    top_k.unlink()
    run_job("run", "none:0:0", *KEEP)
    assert_equal_runs(expected, folder)
    assert (
        load_checkpoint(best).epoch
        == load_checkpoint(expected / "checkpoints/best.safetensors").epoch
    )


def test_resume_replaces_best_weights_of_later_epoch(run_job: RunJob) -> None:
    """`best.safetensors` has a later epoch than the checkpoint that the run resumes from."""
    overrides = (*FIRST_IS_BEST, "checkpoint.every_n_steps=null")
    folder = run_job("run", "raise:0:7", *overrides)
    files = [
        folder / "checkpoints" / name for name in ("best.safetensors", "best-worst.safetensors")
    ]
    for file in files:
        state = load_checkpoint(file)
        assert state.epoch == 1
        save_checkpoint(file, replace(state, epoch=2))
    run_job("run", "raise:0:2", *overrides)
    assert [load_checkpoint(file).epoch for file in files] == [1, 1]


@pytest.mark.parametrize("problem", ["missing", "of another epoch"])
def test_resume_with_lost_best_weights_warns_and_uses_last_weights(
    run_job: RunJob, problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The checkpoint was saved within the next epoch, so the weights of the best are lost."""
    overrides = (*FIRST_IS_BEST, "checkpoint.save_top_k=2")
    folder = run_job("run", "raise:0:9", *overrides)
    files = {
        name: folder / "checkpoints" / name
        for name in ("best.safetensors", "best-worst.safetensors")
    }
    for file in (*files.values(), folder / "checkpoints" / "epoch001.safetensors"):
        state = load_checkpoint(file)
        assert state.epoch == 1
        file.unlink() if problem == "missing" else save_checkpoint(file, replace(state, epoch=3))
    caplog.set_level(logging.INFO, "app.experiment.run")
    run_job("run", "none:0:0", *overrides)
    assert "best.safetensors: the weights of the best epoch 1 are lost" in caplog.text
    assert "loaded the last weights, from epoch 4" in caplog.text
    assert "best-worst.safetensors: the weights of epoch 1 are lost" in caplog.text
    assert "epoch001.safetensors: the weights of epoch 1 are lost" in caplog.text
    last = load_checkpoint(folder / "checkpoints" / "last.safetensors")
    replacement = load_checkpoint(files["best.safetensors"])
    assert (replacement.epoch, last.epoch) == (4, 4)
    assert all(torch.equal(replacement.model[name], last.model[name]) for name in last.model)
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {
        "best.safetensors",
        "last.safetensors",
        "last-1.safetensors",
        "epoch002.safetensors",
    }
    assert pd.read_csv(folder / "test_summary_table.csv")["epoch"].tolist() == [4]


@pytest.mark.parametrize("where", ["train", "valid"])
def test_resume_with_weight_average_keeps_batch_norm_statistics(
    run_job: RunJob, where: str
) -> None:
    """The statistics are recomputed on data with random augmentation."""
    overrides = (
        *KEEP,
        "average=swa",
        "average.start_epoch=1",
        "model._target_=faulty.BatchNormMLP",
    )
    overrides = (*overrides, "+data.augment.noise._target_=torch.nn.Dropout")
    overrides = (*overrides, "goal.metric=train/loss", "goal.mode=min")
    expected = run_job("uninterrupted", "none:0:0", *overrides)
    step = {"train": 7, "valid": 1 + 2 + 1}[where]
    if where == "train":
        folder = run_job("run", f"raise:0:{step}", *overrides)
        (folder / "checkpoints" / "best.safetensors").unlink()
        (folder / "checkpoints" / "epoch001.safetensors").unlink()
    else:
        folder = expected.parent / "run"
        with pytest.raises(TrainingInterrupted):
            run_job("run", f"SIGTERM:0:{step}:valid", *overrides)
    run_job("run", "none:0:0", *overrides)
    assert_equal_runs(expected, folder)
    for name in ("best.safetensors", "epoch001.safetensors", "epoch002.safetensors"):
        one, other = (load_checkpoint(f / "checkpoints" / name).model for f in (expected, folder))
        assert all(torch.equal(one[key], other[key]) for key in one)
