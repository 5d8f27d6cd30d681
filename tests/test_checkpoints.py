"""What stands in the folder of checkpoints: kept, damaged, passed over."""

from __future__ import annotations

import logging
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import job_for, run_app
from cutting import TINY, Cut, cutting, trained_on
from processes import TESTS, assert_equal_runs
from torch import nn

from app.callbacks.tables import drop_torn_line
from app.runtime.background_writer import BackgroundWriter
from app.runtime.errors import ConfigError, UserError
from app.training.checkpoint.checkpoint import load_checkpoint
from app.training.checkpoint.checksum import (
    CheckpointInfo,
    read_info,
    verify_checksum,
    write_with_checksum,
)
from app.training.checkpoint.content_check import check_savable
from app.training.checkpoint.rotation import CheckpointRotation, latest_valid, list_checkpoints
from app.training.checkpoint.train_state import TrainState
from app.training.optim.weight_averaging import WeightAveraging
from app.training.plan import SaveSchedule
from app.training.supervised import SupervisedTask

KEEP = ("checkpoint.keep_last=3", "trainer.max_epochs=2")


@pytest.fixture
def cut(tmp_path: Path) -> Iterator[Cut]:
    with cutting(tmp_path) as cut:
        yield cut


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run left alone, and one that was cut in the midst of its second epoch."""
    home = tmp_path_factory.mktemp("stopped")
    with cutting(home) as cut:
        return cut("whole", "none:0:0", *KEEP), cut("run", "raise:0:9", *KEEP)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def of_weights(path: Path) -> None:
    shutil.copy(path.parent / "best.pt", path)


DAMAGE = {
    truncated: "is truncated or no checkpoint",
    flipped: "does not have its checksum",
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
    with cutting(tmp_path, writes=False) as cut:
        where = ("--config-dir", str(tmp_path / "conf"), "resume=auto", *cut_words(tmp_path))
        job = job_for(*where)
        assert job.config.resume == str(files[1 if place == 0 else 0])
        if place == 0:
            (problem,) = job.damaged
            assert str(files[0]) in problem
            assert DAMAGE[damage] in problem
        else:
            assert job.damaged == []
        cut("run", "none:0:0", *KEEP)
    assert_equal_runs(whole, tmp_path / "run")
    for path in list_checkpoints(tmp_path / "run"):
        assert verify_checksum(path).kind == "state"
    steps = trained_on(tmp_path / "run")
    assert len(steps) == len(trained_on(whole)) + (place == 0), "at most a step is learned again"


def cut_words(home: Path) -> tuple[str, ...]:
    return (*TINY, *KEEP, f"hydra.run.dir={home / 'run'}")


def test_both_files_are_named_in_a_warning(stopped: tuple[Path, Path], tmp_path: Path) -> None:

    shutil.copytree(stopped[1].parent, tmp_path / "home")
    folder = tmp_path / "home" / "run"
    flipped(folder / "checkpoints" / "last.pt")
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
        flipped(path)
    with cutting(tmp_path / "home", writes=False) as cut, pytest.raises(ConfigError) as refused:
        cut("run", "none:0:0", *KEEP)
    assert str(refused.value).count("does not have its checksum") == 3


def test_a_state_can_be_chosen(stopped: tuple[Path, Path], tmp_path: Path) -> None:
    whole, original = stopped
    shutil.copytree(original.parent, tmp_path / "home")
    folder = tmp_path / "home" / "run"
    chosen = folder / "checkpoints" / "last-2.pt"
    with cutting(tmp_path / "home", writes=False) as cut:
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
    assert len(trained_on(folder)) == len(trained_on(whole)) + 2


def test_what_cannot_be_removed_is_a_warning(cut: Cut, caplog: pytest.LogCaptureFixture) -> None:
    words = ("checkpoint.save_top_k=1", "checkpoint.keep_last=2", "trainer.max_epochs=1")
    in_the_way = cut("run", "raise:0:4") / "checkpoints" / "last-1.pt" / "full"
    in_the_way.parent.unlink()
    in_the_way.mkdir(parents=True)
    cut("run", "none:0:0", *words)
    assert "last-1.pt" in caplog.text
    assert "cannot be" in caplog.text
    assert verify_checksum(in_the_way.parents[1] / "last.pt").number > 3


@pytest.mark.parametrize("size", [1, 2])
def test_saving_by_the_clock(cut: Cut, size: int) -> None:
    """With several ranks after the same step of all, about five times a second."""
    words = ("checkpoint.every_n_steps=null", "checkpoint.every_n_minutes=1e-6")
    folder = cut("run", "slow:0:0.1", *words, "trainer.max_epochs=2", size=size)
    assert read_info(folder / "checkpoints" / "last.pt").number >= (10 if size == 1 else 4)


def test_saved_in_the_background_it_is_the_same(cut: Cut) -> None:
    whole = cut("whole", "none:0:0", *KEEP)
    folder = cut("run", "none:0:0", *KEEP, "checkpoint.asynchronous=true")
    assert_equal_runs(whole, folder)
    for name in ("last.pt", "last-1.pt", "last-2.pt", "best.pt"):
        one, other = (load_checkpoint(f / "checkpoints" / name) for f in (whole, folder))
        assert one.epoch == other.epoch
        assert all(torch.equal(one.model[key], other.model[key]) for key in one.model)
        if one.training and other.training:
            assert one.training["batches"] == other.training["batches"]


def test_what_changes_meanwhile_is_not_written(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    task = SupervisedTask(model, nn.MSELoss())
    saving = SaveSchedule(in_background=True)
    state = TrainState(task, WeightAveraging(model), tmp_path, None, None, saving)
    wanted, go_on = model.weight.detach().clone(), threading.Event()
    state.writer.submit(lambda: go_on.wait(60) and None)
    state.save_best()
    model.weight.data.zero_()
    go_on.set()
    state.writer.wait()
    assert torch.equal(load_checkpoint(tmp_path).model["weight"], wanted)


def test_what_fails_in_the_background_is_told() -> None:
    writer = BackgroundWriter(in_background=True)

    def fail() -> None:
        raise UserError("the disk is full")

    writer.submit(fail)
    with pytest.raises(UserError, match="the disk is full"):
        writer.submit(lambda: None, wait_first=True)


def test_any_byte_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with path.open("wb") as file:
        write_with_checksum(
            file, "a.pt", CheckpointInfo("state", 3, 7), lambda f: torch.save({"a": 1}, f)
        )
    assert verify_checksum(path) == CheckpointInfo("state", 3, 7)
    whole = path.read_bytes()
    assert torch.load(path, weights_only=True) == {"a": 1}
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(UserError):
            verify_checksum(path)
    for length in random.Random(0).sample(range(len(whole)), 200):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError):
            verify_checksum(path)


def test_the_state_that_a_run_goes_on_from_stays_until_there_are_others(tmp_path: Path) -> None:
    def save(states: CheckpointRotation, number: int) -> None:
        seal = CheckpointInfo("state", 1, number)
        states.write(
            lambda file: write_with_checksum(file, "", seal, lambda f: torch.save(number, f))
        )

    first = CheckpointRotation(tmp_path, keep=3)
    for number in (1, 2, 3):
        save(first, number)
    flipped(tmp_path / "checkpoints" / "last.pt")
    again = CheckpointRotation(tmp_path, keep=3)
    again.resume_from(tmp_path / "checkpoints" / "last-1.pt")
    save(again, 3)
    assert [verify_checksum(path).number for path in list_checkpoints(tmp_path)] == [3, 2, 1]
    fewer = CheckpointRotation(tmp_path, keep=2)
    fewer.resume_from(tmp_path / "checkpoints" / "last.pt")
    save(fewer, 4)
    assert [verify_checksum(path).number for path in list_checkpoints(tmp_path)] == [4, 3]
    link = tmp_path / "link"
    link.symlink_to(tmp_path, target_is_directory=True)  # another path to the same file
    fewer.resume_from(link / "checkpoints" / "last-1.pt")
    save(fewer, 5)
    assert [verify_checksum(path).number for path in list_checkpoints(tmp_path)] == [5, 3]


def test_what_could_not_be_read_again_is_not_saved() -> None:
    check_savable("task", {"a": [torch.ones(1), 1, 0.5, "x", None, (True,)]})
    for value in ({1}, b"x", np.float64(1), {("a", 1): 2}, [1j]):
        with pytest.raises(UserError, match=r"task\.a.*cannot be saved; allowed"):
            check_savable("task", {"a": value})


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


def test_a_line_that_was_cut_off_goes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, whole = tmp_path / "a.csv", "iter,loss\n1,0.5\n2,0.25\n"
    for length in range(len("iter,loss\n"), len(whole)):
        path.write_text(whole[:length])
        drop_torn_line(path)
        table = pd.read_csv(path)
        assert list(table.columns) == ["iter", "loss"]
        assert table["iter"].tolist() == [1, 2][: len(table)]
        assert table["loss"].tolist() == [0.5, 0.25][: len(table)]
    assert "was cut off: its last line is dropped" in caplog.text


def test_what_was_written_past_the_state_goes(cut: Cut) -> None:
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
