"""The best weights: kept, lost, of a future that was gone back from."""

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
WORST = (  # the first epoch has the highest loss
    "goal.metric=train/loss",
    "goal.mode=max",
    "checkpoint.save_top_k=1",
    "+checkpoint.monitors.worst={metric: train/loss, mode: max}",
)


@pytest.fixture
def cut(tmp_path: Path) -> Iterator[RunJob]:
    with job_runner(tmp_path) as cut:
        yield cut


def test_the_best_epochs_stay(cut: RunJob) -> None:
    folder = cut("run", "none:0:0", "checkpoint.save_top_k=2", "checkpoint.keep_last=1")
    rows = pd.read_csv(folder / "valid_summary_table.csv")
    ranked = rows.sort_values(["accuracy", "epoch"], ascending=[False, True])["epoch"][:2]
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {"best.pt", "last.pt", *(f"epoch{epoch:03d}.pt" for epoch in ranked)}
    best, first = (folder / "checkpoints" / n for n in ("best.pt", f"epoch{ranked.iloc[0]:03d}.pt"))
    one, other = (load_checkpoint(path) for path in (best, first))
    assert one.epoch == other.epoch == ranked.iloc[0]
    assert all(torch.equal(one.model[name], other.model[name]) for name in one.model)


def test_a_lost_best_is_written_again_where_it_can_be(cut: RunJob) -> None:
    """The state stands right behind the best epoch, whose weights it has."""
    whole = cut("whole", "none:0:0", *KEEP)
    folder = cut("run", "raise:0:7", *KEEP)
    best, among = (folder / "checkpoints" / name for name in ("best.pt", "epoch001.pt"))
    best.write_bytes(best.read_bytes()[:-1000])
    among.unlink()
    cut("run", "none:0:0", *KEEP)
    assert_equal_runs(whole, folder)
    assert load_checkpoint(best).epoch == load_checkpoint(whole / "checkpoints/best.pt").epoch


def test_the_weights_of_a_future_that_never_was_are_not_the_best(cut: RunJob) -> None:
    """The best epoch is the last one of the state; a later best had been written already."""
    words = (*WORST, "checkpoint.every_n_steps=null")
    folder = cut("run", "raise:0:7", *words)
    files = [folder / "checkpoints" / name for name in ("best.pt", "best-worst.pt")]
    for file in files:
        state = load_checkpoint(file)
        assert state.epoch == 1
        save_checkpoint(file, replace(state, epoch=2))
    cut("run", "raise:0:2", *words)
    assert [load_checkpoint(file).epoch for file in files] == [1, 1]


@pytest.mark.parametrize("loss", ["gone", "of another epoch"])
def test_what_is_lost_for_good_is_said_and_the_last_weights_stand_in(
    cut: RunJob, loss: str, caplog: pytest.LogCaptureFixture
) -> None:
    """In the midst of the next epoch nobody has the weights of the best one."""
    words = (*WORST, "checkpoint.save_top_k=2")
    folder = cut("run", "raise:0:9", *words)
    files = {name: folder / "checkpoints" / name for name in ("best.pt", "best-worst.pt")}
    for file in (*files.values(), folder / "checkpoints" / "epoch001.pt"):
        state = load_checkpoint(file)
        assert state.epoch == 1
        file.unlink() if loss == "gone" else save_checkpoint(file, replace(state, epoch=3))
    caplog.set_level(logging.INFO, "app.experiment.run")
    cut("run", "none:0:0", *words)
    assert "the best epoch was 1, but its weights are lost: the last stand in" in caplog.text
    assert "the last weights are those of epoch 4" in caplog.text
    assert "best-worst.pt is lost" in caplog.text
    assert "epoch001.pt is lost" in caplog.text
    last = load_checkpoint(folder / "checkpoints" / "last.pt")
    stands_in = load_checkpoint(files["best.pt"])
    assert (stands_in.epoch, last.epoch) == (4, 4)
    assert all(torch.equal(stands_in.model[name], last.model[name]) for name in last.model)
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {"best.pt", "last.pt", "last-1.pt", "epoch002.pt"}
    assert pd.read_csv(folder / "test_summary_table.csv")["epoch"].tolist() == [4]


@pytest.mark.parametrize("where", ["train", "valid"])
def test_an_average_has_the_same_statistics_of_batches_after_a_cut(cut: RunJob, where: str) -> None:
    """They are measured on data that is random, too."""
    words = (*KEEP, "average=swa", "average.start_epoch=1", "model._target_=faulty.Normed")
    words = (*words, "+data.augment.noise._target_=torch.nn.Dropout")
    words = (*words, "goal.metric=train/loss", "goal.mode=min")
    whole = cut("whole", "none:0:0", *words)
    step = {"train": 7, "valid": 1 + 2 + 1}[where]
    if where == "train":
        folder = cut("run", f"raise:0:{step}", *words)
        (folder / "checkpoints" / "best.pt").unlink()
        (folder / "checkpoints" / "epoch001.pt").unlink()
    else:
        folder = whole.parent / "run"
        with pytest.raises(TrainingInterrupted):
            cut("run", f"SIGTERM:0:{step}:valid", *words)
    cut("run", "none:0:0", *words)
    assert_equal_runs(whole, folder)
    for name in ("best.pt", "epoch001.pt", "epoch002.pt"):
        one, other = (load_checkpoint(f / "checkpoints" / name).model for f in (whole, folder))
        assert all(torch.equal(one[key], other[key]) for key in one)
