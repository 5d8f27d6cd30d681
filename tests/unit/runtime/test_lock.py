"""Locks of run folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.runtime.errors import StorageError, UserError
from app.runtime.lock import FolderInUseError, check_unlocked, file_lock, run_lock


@pytest.mark.parametrize("name", [".lock", "run.log", "wandb", "epoch_details/a.csv"])
def test_run_lock_folder_with_symlink_is_refused(tmp_path: Path, name: str) -> None:
    target = tmp_path / "target"
    target.write_text("original")
    folder = tmp_path / "run"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).symlink_to(target)
    for lock in (check_unlocked, lambda folder: run_lock(folder).__enter__()):
        with pytest.raises(UserError, match="is a symbolic link"):
            lock(folder)
    assert target.read_text() == "original"


def test_check_unlocked_lock_is_folder_raises_storage_error(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(StorageError, match="cannot be locked"):
        check_unlocked(tmp_path)


def test_file_lock_held_raises_given_error_until_released(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lock"
    with (
        file_lock(path),
        pytest.raises(FolderInUseError, match="busy"),
        file_lock(path, in_use=lambda: FolderInUseError("busy")),
    ):
        pass
    with file_lock(path, in_use=lambda: FolderInUseError("busy")):
        pass
