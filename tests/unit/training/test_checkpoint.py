"""What stands in the folder of checkpoints: kept, damaged, passed over."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from app.callbacks.tables import drop_torn_line
from app.runtime.background_writer import BackgroundWriter
from app.runtime.errors import UserError
from app.training.checkpoint.checkpoint import load_checkpoint
from app.training.checkpoint.checksum import (
    CheckpointInfo,
    verify_checksum,
    write_with_checksum,
)
from app.training.checkpoint.content_check import check_savable
from app.training.checkpoint.rotation import CheckpointRotation, list_checkpoints
from app.training.checkpoint.train_state import TrainState
from app.training.optim.weight_averaging import WeightAveraging
from app.training.plan import SaveSchedule
from app.training.supervised import SupervisedTask
from tests.support.hostile_files import flip_bit


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
    flip_bit(tmp_path / "checkpoints" / "last.pt")
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


def test_a_line_that_was_cut_off_goes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, whole = tmp_path / "a.csv", "iter,loss\n1,0.5\n2,0.25\n"
    for length in range(len("iter,loss\n"), len(whole)):
        path.write_text(whole[:length])
        drop_torn_line(path)
        table = pd.read_csv(path)
        assert list(table.columns) == ["iter", "loss"]
        assert table["iter"].tolist() == [1, 2][: len(table)]
        assert table["loss"].tolist() == [0.5, 0.25][: len(table)]
    assert "ends with an incomplete line, which is removed" in caplog.text
