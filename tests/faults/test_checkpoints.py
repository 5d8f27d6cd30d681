"""Training checkpoints of a run: rotation, damage, and the choice of the one to resume from."""

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
from app.training.checkpoint.header import read_info, verify_checksum
from app.training.checkpoint.rotation import latest_valid, list_checkpoints
from tests.support.hostile_files import flip_bit
from tests.support.interrupted_runs import TINY_RUN, RunJob, job_runner, samples_per_step
from tests.support.processes import SUPPORT_DIR, assert_equal_runs
from tests.support.runs import job_for, run_app

KEEP = ("checkpoint.keep_last=3", "trainer.max_epochs=2")


@pytest.fixture
def run_job(tmp_path: Path) -> Iterator[RunJob]:
    with job_runner(tmp_path) as run_job:
        yield run_job


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An uninterrupted run, and one that was interrupted in the middle of its second epoch."""
    home = tmp_path_factory.mktemp("runs")
    with job_runner(home) as run_job:
        return run_job("uninterrupted", "none:0:0", *KEEP), run_job("run", "raise:0:9", *KEEP)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def make_empty(path: Path) -> None:
    path.write_bytes(b"")


def replace_by_weights(path: Path) -> None:
    shutil.copy(path.parent / "best.safetensors", path)


DAMAGE = {
    truncate: "is truncated or not a checkpoint",
    flip_bit: "its checksum does not match",
    make_empty: "is truncated or not a checkpoint",
    replace_by_weights: "contains weights only",
}


@pytest.mark.parametrize(
    ("index", "damage"),
    [
        *((0, damage) for damage in DAMAGE),
        *((1, make_empty), (1, replace_by_weights), (2, truncate), (2, flip_bit)),
    ],
)
def test_resume_skips_damaged_checkpoint(
    runs: tuple[Path, Path], tmp_path: Path, damage: Callable[[Path], None], index: int
) -> None:
    """Damage the newest or an older one; the run ends like the uninterrupted one."""
    expected, original = runs
    shutil.copytree(original.parent / "conf", tmp_path / "conf")
    shutil.copytree(original, tmp_path / "run")
    files = [
        tmp_path / "run" / "checkpoints" / n
        for n in ("last.safetensors", "last-1.safetensors", "last-2.safetensors")
    ]
    damage(files[index])
    with job_runner(tmp_path, write_data=False) as run_job:
        arguments = ("--config-dir", str(tmp_path / "conf"), f"hydra.run.dir={tmp_path / 'run'}")
        job = job_for(*arguments, "resume=auto", *TINY_RUN, *KEEP)
        assert job.config.resume == str(files[1 if index == 0 else 0])
        if index == 0:
            (problem,) = job.damaged_checkpoints
            assert str(files[0]) in problem
            assert DAMAGE[damage] in problem
        else:
            assert job.damaged_checkpoints == []
        run_job("run", "none:0:0", *KEEP)
    assert_equal_runs(expected, tmp_path / "run")
    for path in list_checkpoints(tmp_path / "run"):
        assert verify_checksum(path).kind == "state"
    steps = samples_per_step(tmp_path / "run")
    assert len(steps) == len(samples_per_step(expected)) + (index == 0), (
        "at most one step is repeated"
    )


def test_resume_warns_with_names_of_damaged_and_used_checkpoint(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(runs[1].parent, tmp_path / "home")
    folder = tmp_path / "home" / "run"
    flip_bit(folder / "checkpoints" / "last.safetensors")
    arguments = ("--config-dir", str(tmp_path / "home" / "conf"), "trusted_targets=[faulty]")
    environment = {"PYTHONPATH": SUPPORT_DIR, "FAULT": "none:0:0", "IDS": str(tmp_path / "ids")}
    ran = run_app(tmp_path, *arguments, f"resume={folder}", **environment)
    assert ran.code == 0, ran.err + ran.out
    line = next(line for line in ran.out.splitlines() if "its checksum does not match" in line)
    assert str(folder / "checkpoints" / "last.safetensors") in line
    assert f"resuming from {folder / 'checkpoints' / 'last-1.safetensors'}" in line
    assert "its checksum does not match" in (folder / "run.log").read_text()


def test_resume_with_all_checkpoints_damaged_fails(runs: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(runs[1].parent, tmp_path / "home")
    for path in list_checkpoints(tmp_path / "home" / "run"):
        flip_bit(path)
    with (
        job_runner(tmp_path / "home", write_data=False) as run_job,
        pytest.raises(ConfigError) as refused,
    ):
        run_job("run", "none:0:0", *KEEP)
    assert str(refused.value).count("its checksum does not match") == 3


def test_resume_from_chosen_checkpoint(runs: tuple[Path, Path], tmp_path: Path) -> None:
    expected, original = runs
    shutil.copytree(original.parent, tmp_path / "home")
    folder = tmp_path / "home" / "run"
    chosen = folder / "checkpoints" / "last-2.safetensors"
    with job_runner(tmp_path / "home", write_data=False) as run_job:
        arguments = ("--config-dir", str(tmp_path / "home" / "conf"), "trusted_targets=[faulty]")
        job = job_for(*arguments, f"resume={chosen}")
        assert job.config.resume == str(chosen)
        run_job("run", "none:0:0", f"resume={chosen}", *KEEP)
        with pytest.raises(ConfigError, match="contains weights only"):
            job_for(*arguments, f"resume={folder / 'checkpoints' / 'best.safetensors'}")
        stray = tmp_path / "stray.safetensors"
        shutil.copy(folder / "checkpoints" / "last.safetensors", stray)
        with pytest.raises(ConfigError, match="is not a checkpoint of the run in"):
            job_for(*arguments, f"resume={stray}")
    assert_equal_runs(expected, folder)
    assert len(samples_per_step(folder)) == len(samples_per_step(expected)) + 2


def test_checkpoint_that_cannot_be_removed_is_only_a_warning(
    run_job: RunJob, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ("checkpoint.save_top_k=1", "checkpoint.keep_last=2", "trainer.max_epochs=1")
    in_the_way = run_job("run", "raise:0:4") / "checkpoints" / "last-1.safetensors" / "full"
    in_the_way.parent.unlink()
    in_the_way.mkdir(parents=True)
    run_job("run", "none:0:0", *arguments)
    assert "last-1.safetensors" in caplog.text
    assert "cannot be" in caplog.text
    assert verify_checksum(in_the_way.parents[1] / "last.safetensors").number > 3


@pytest.mark.parametrize("size", [1, 2])
def test_every_n_minutes_saves_within_epochs(run_job: RunJob, size: int) -> None:
    """Several ranks agree on a step about five times a second."""
    arguments = ("checkpoint.every_n_steps=null", "checkpoint.every_n_minutes=1e-6")
    folder = run_job("run", "slow:0:0.1", *arguments, "trainer.max_epochs=2", size=size)
    assert read_info(folder / "checkpoints" / "last.safetensors").number >= (10 if size == 1 else 4)


def test_asynchronous_saving_writes_same_checkpoints(run_job: RunJob) -> None:
    expected = run_job("uninterrupted", "none:0:0", *KEEP)
    folder = run_job("run", "none:0:0", *KEEP, "checkpoint.asynchronous=true")
    assert_equal_runs(expected, folder)
    for name in (
        "last.safetensors",
        "last-1.safetensors",
        "last-2.safetensors",
        "best.safetensors",
    ):
        one, other = (load_checkpoint(f / "checkpoints" / name) for f in (expected, folder))
        assert one.epoch == other.epoch
        assert all(torch.equal(one.model[key], other.model[key]) for key in one.model)
        if one.training and other.training:
            assert one.training["batches"] == other.training["batches"]


def test_list_checkpoints_with_swapped_files_sorts_by_content(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(runs[1] / "checkpoints", tmp_path / "checkpoints")
    inside = tmp_path / "checkpoints"
    newest = read_info(inside / "last.safetensors").number
    (inside / "last.safetensors").rename(inside / "swapped")
    (inside / "last-2.safetensors").rename(inside / "last.safetensors")
    (inside / "swapped").rename(inside / "last-2.safetensors")
    assert [read_info(path).number for path in list_checkpoints(tmp_path)] == [
        newest - n for n in range(3)
    ]
    assert latest_valid(tmp_path) == (inside / "last-2.safetensors", [])


def test_resume_removes_table_rows_after_checkpoint(run_job: RunJob) -> None:
    """The resumed run has an additional column."""
    folder = run_job("run", "raise:0:14")
    later = folder / "epoch_details" / "epoch004_train.csv"
    shutil.copy(folder / "epoch_details" / "epoch001_train.csv", later)
    details = folder / "epoch_details" / "epoch002_train.csv"
    details.write_bytes(details.read_bytes()[:-3])
    logging.getLogger("app").setLevel(logging.INFO)
    run_job(
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
