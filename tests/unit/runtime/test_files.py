"""Atomic writes, full disks, missing permissions and leftovers of killed processes."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from app.callbacks.tables import truncate_to_history
from app.runtime.errors import StorageError, UserError
from app.runtime.files import atomic_write, read_status, remove_temp_files, write_text
from app.runtime.small_files import read_json
from app.sweep.outcome import read_run_status
from app.training.checkpoint.checkpoint import write_model
from app.training.checkpoint.header import CheckpointInfo
from app.training.checkpoint.store import write_store
from tests.support.permissions import permissions


def write_checkpoint(path: Path) -> None:
    content = {"weights": torch.ones(1_000_000)}
    info = CheckpointInfo("state", 1, 1)
    atomic_write(path, lambda file: write_store(file, path.name, info, content))


@contextmanager
def file_size_limit() -> Iterator[None]:
    """Limit files to 1000 bytes."""
    previous_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, previous_limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous_limit)
        signal.signal(signal.SIGXFSZ, previous_handler)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_text(path, "x" * 100_000),
        write_checkpoint,
        lambda path: write_model(path, {"weights": torch.ones(1_000_000)}),
    ],
    ids=["text", "checkpoint", "model"],
)
def test_atomic_write_failure_keeps_existing_file(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    path = tmp_path / "folder" / "a.txt"
    write_text(path, "first")
    with pytest.raises(StorageError) as error, file_size_limit():
        write(path)
    assert str(path) in str(error.value)
    assert "File too large" in str(error.value)
    assert path.read_text() == "first"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_remove_temp_files_keeps_other_files_and_runs_inside(tmp_path: Path) -> None:
    temp_file = tmp_path / "checkpoints" / ".last.safetensors.part"
    temp_file.parent.mkdir()
    temp_file.write_text("incomplete")
    (tmp_path / "checkpoints" / "user.part").write_text("file of the user")
    other_run = tmp_path / "other" / ".status.json.part"  # another run, which may be running
    other_run.parent.mkdir()
    other_run.touch()
    (other_run.parent / "status.json").write_text("{}")
    remove_temp_files(tmp_path)
    assert [path.name for path in temp_file.parent.iterdir()] == ["user.part"]
    assert other_run.exists()


def test_remove_temp_files_read_only_folder_raises_storage_error(tmp_path: Path) -> None:
    table = tmp_path / "epoch_details" / "epoch001_train.csv"
    write_text(table, "a\n1\n")
    unwritable = permissions(table.parent, 0o555)
    with unwritable, pytest.raises(StorageError, match=r"csv cannot be written"):
        truncate_to_history(tmp_path, ())
    (table.parent / ".a.csv.part").touch()
    unwritable = permissions(table.parent, 0o555)
    with unwritable, pytest.raises(StorageError, match=r"part cannot be written"):
        remove_temp_files(tmp_path)


def test_read_json_damaged_status_is_reported(tmp_path: Path) -> None:
    for content in ("{", "[]", "[" * 100_000, '{"status": 3}'):
        (tmp_path / "status.json").write_text(content)
        with pytest.raises(UserError, match=r"status\.json is damaged"):
            read_run_status(tmp_path)


def test_read_status_unreadable_file_warns_and_read_json_raises(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "run" / "status.json"
    write_text(file, "{}")
    with permissions(file, 0):
        with pytest.raises(UserError, match=r"status\.json cannot be read: Permission denied"):
            read_json(file.parent, "status.json")
        assert read_status(file.parent) == {}
    assert "it will be overwritten" in caplog.text
    file.unlink()
    file.mkdir()
    with pytest.raises(UserError, match=r"status\.json is a folder; allowed: a regular file"):
        read_json(file.parent, "status.json")


def test_atomic_write_failure_keeps_old_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    write_text(path, "old")

    def fail(file: Any) -> None:
        file.write(b"half of it")
        raise OSError("disk full")

    with pytest.raises(StorageError, match="disk full"):
        atomic_write(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]
