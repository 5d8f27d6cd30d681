"""What stands in the folder of checkpoints: kept, damaged, passed over."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch

from app.runtime.errors import ConfigError
from app.training.checkpoint.checkpoint import load_checkpoint
from app.training.checkpoint.checksum import (
    read_info,
    verify_checksum,
)
from app.training.checkpoint.rotation import latest_valid, list_checkpoints
from tests.support.hostile_files import flip_bit
from tests.support.interrupted_runs import TINY_RUN, RunJob, job_runner, samples_per_step
from tests.support.processes import TESTS, assert_equal_runs
from tests.support.runs import job_for, run_app

KEEP = ("checkpoint.keep_last=3", "trainer.max_epochs=2")


@pytest.fixture
def cut(tmp_path: Path) -> Iterator[RunJob]:
    with job_runner(tmp_path) as cut:
        yield cut


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run left alone, and one that was cut in the midst of its second epoch."""
    home = tmp_path_factory.mktemp("stopped")
    with job_runner(home) as cut:
        return cut("whole", "none:0:0", *KEEP), cut("run", "raise:0:9", *KEEP)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def of_weights(path: Path) -> None:
    shutil.copy(path.parent / "best.pt", path)


DAMAGE = {
    truncated: "is truncated or no checkpoint",
    flip_bit: "does not have its checksum",
    emptied: "is truncated or no checkpoint",
    of_weights: "holds weights alone",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_damaged_state_is_passed_over(
    stopped: tuple[Path, Path], tmp_path: Path, damage: Callable[[Path], None], place: int
) -> None:
    """The newest, or one behind it; the run ends as the one that was left alone."""
    whole, original = stopped
    shutil.copytree(original.parent / "conf", tmp_path / "conf")
    shutil.copytree(original, tmp_path / "run")
    files = [tmp_path / "run" / "checkpoints" / n for n in ("last.pt", "last-1.pt", "last-2.pt")]
    damage(files[place])
    with job_runner(tmp_path, writes=False) as cut:
        where = ("--config-dir", str(tmp_path / "conf"), "resume=auto", *cut_words(tmp_path))
        job = job_for(*where)
        assert job.config.resume == str(files[1 if place == 0 else 0])
        if place == 0:
            (problem,) = job.damaged_checkpoints
            assert str(files[0]) in problem
            assert DAMAGE[damage] in problem
        else:
            assert job.damaged_checkpoints == []
        cut("run", "none:0:0", *KEEP)
    assert_equal_runs(whole, tmp_path / "run")
    for path in list_checkpoints(tmp_path / "run"):
        assert verify_checksum(path).kind == "state"
    steps = samples_per_step(tmp_path / "run")
    assert len(steps) == len(samples_per_step(whole)) + (place == 0), "at most a step is learned again"


def cut_words(home: Path) -> tuple[str, ...]:
    return (*TINY_RUN, *KEEP, f"hydra.run.dir={home / 'run'}")


def test_both_files_are_named_in_a_warning(stopped: tuple[Path, Path], tmp_path: Path) -> None:

    shutil.copytree(stopped[1].parent, tmp_path / "home")
    folder = tmp_path / "home" / "run"
    flip_bit(folder / "checkpoints" / "last.pt")
    words = ("--config-dir", str(tmp_path / "home" / "conf"), "trusted_targets=[faulty]")
    environment = {"PYTHONPATH": TESTS, "FAULT": "none:0:0", "IDS": str(tmp_path / "ids")}
    ran = run_app(tmp_path, *words, f"resume={folder}", **environment)
    assert ran.code == 0, ran.err + ran.out
    line = next(line for line in ran.out.splitlines() if "does not have its checksum" in line)
    assert str(folder / "checkpoints" / "last.pt") in line
    assert f"going on from {folder / 'checkpoints' / 'last-1.pt'}" in line
    assert "does not have its checksum" in (folder / "run.log").read_text()


def test_where_all_are_damaged_nothing_begins(stopped: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(stopped[1].parent, tmp_path / "home")
    for path in list_checkpoints(tmp_path / "home" / "run"):
        flip_bit(path)
    with job_runner(tmp_path / "home", writes=False) as cut, pytest.raises(ConfigError) as refused:
        cut("run", "none:0:0", *KEEP)
    assert str(refused.value).count("does not have its checksum") == 3


def test_a_state_can_be_chosen(stopped: tuple[Path, Path], tmp_path: Path) -> None:
    whole, original = stopped
    shutil.copytree(original.parent, tmp_path / "home")
    folder = tmp_path / "home" / "run"
    chosen = folder / "checkpoints" / "last-2.pt"
    with job_runner(tmp_path / "home", writes=False) as cut:
        words = ("--config-dir", str(tmp_path / "home" / "conf"), "trusted_targets=[faulty]")
        job = job_for(*words, f"resume={chosen}")
        assert job.config.resume == str(chosen)
        cut("run", "none:0:0", f"resume={chosen}", *KEEP)
        with pytest.raises(ConfigError, match="holds weights alone"):
            job_for(*words, f"resume={folder / 'checkpoints' / 'best.pt'}")
        stray = tmp_path / "stray.pt"
        shutil.copy(folder / "checkpoints" / "last.pt", stray)
        with pytest.raises(ConfigError, match="is no state of the run in"):
            job_for(*words, f"resume={stray}")
    assert_equal_runs(whole, folder)
    assert len(samples_per_step(folder)) == len(samples_per_step(whole)) + 2


def test_what_cannot_be_removed_is_a_warning(cut: RunJob, caplog: pytest.LogCaptureFixture) -> None:
    words = ("checkpoint.save_top_k=1", "checkpoint.keep_last=2", "trainer.max_epochs=1")
    in_the_way = cut("run", "raise:0:4") / "checkpoints" / "last-1.pt" / "full"
    in_the_way.parent.unlink()
    in_the_way.mkdir(parents=True)
    cut("run", "none:0:0", *words)
    assert "last-1.pt" in caplog.text
    assert "cannot be" in caplog.text
    assert verify_checksum(in_the_way.parents[1] / "last.pt").number > 3


@pytest.mark.parametrize("size", [1, 2])
def test_saving_by_the_clock(cut: RunJob, size: int) -> None:
    """With several ranks after the same step of all, about five times a second."""
    words = ("checkpoint.every_n_steps=null", "checkpoint.every_n_minutes=1e-6")
    folder = cut("run", "slow:0:0.1", *words, "trainer.max_epochs=2", size=size)
    assert read_info(folder / "checkpoints" / "last.pt").number >= (10 if size == 1 else 4)


def test_saved_in_the_background_it_is_the_same(cut: RunJob) -> None:
    whole = cut("whole", "none:0:0", *KEEP)
    folder = cut("run", "none:0:0", *KEEP, "checkpoint.asynchronous=true")
    assert_equal_runs(whole, folder)
    for name in ("last.pt", "last-1.pt", "last-2.pt", "best.pt"):
        one, other = (load_checkpoint(f / "checkpoints" / name) for f in (whole, folder))
        assert one.epoch == other.epoch
        assert all(torch.equal(one.model[key], other.model[key]) for key in one.model)
        if one.training and other.training:
            assert one.training["batches"] == other.training["batches"]


def test_states_are_ordered_by_what_they_are(stopped: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(stopped[1] / "checkpoints", tmp_path / "checkpoints")
    inside = tmp_path / "checkpoints"
    newest = read_info(inside / "last.pt").number
    (inside / "last.pt").rename(inside / "swapped")
    (inside / "last-2.pt").rename(inside / "last.pt")
    (inside / "swapped").rename(inside / "last-2.pt")
    assert [read_info(path).number for path in list_checkpoints(tmp_path)] == [
        newest - n for n in range(3)
    ]
    assert latest_valid(tmp_path) == (inside / "last-2.pt", [])


def test_what_was_written_past_the_state_goes(cut: RunJob) -> None:
    """With a column that was not there before."""
    folder = cut("run", "raise:0:14")
    later = folder / "epoch_details" / "epoch004_train.csv"
    shutil.copy(folder / "epoch_details" / "epoch001_train.csv", later)
    details = folder / "epoch_details" / "epoch002_train.csv"
    details.write_bytes(details.read_bytes()[:-3])
    logging.getLogger("app").setLevel(logging.INFO)
    cut(
        "run",
        "none:0:0",
        "trainer.max_epochs=3",
        "+metric.valid.more={_target_: "
        "torchmetrics.classification.MulticlassPrecision, num_classes: 2}",
    )
    assert not later.exists()
    assert pd.read_csv(details)["iter"].tolist() == [1, 2, 3, 4]
    table = pd.read_csv(folder / "valid_summary_table.csv")
    assert table["epoch"].tolist() == [1, 2, 3]
    assert table["more"].isna().tolist() == [True, True, False]
    text = (folder / "summary_table.csv").read_text()
    assert text.count("epoch,stage") == 1
