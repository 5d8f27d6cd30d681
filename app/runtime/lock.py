"""Lock run folders, so that one process at a time writes there; a dead process holds no lock."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from app.runtime.errors import UserError, as_storage_error, as_user_error
from app.runtime.files import read_json, write_json

log = logging.getLogger(__name__)
RUN_SUBFOLDERS = (
    "checkpoints",
    "epoch_details",
    "plots",
    "logs",
    "predictions",
    ".hydra",
    "tensorboard",
)
LOCK_FILE, OWNER_FILE = ".lock", ".owner.json"


class FolderInUseError(UserError):
    """Another process holds the lock of the folder."""


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the exclusive lock of a run folder, which is created if missing.

    Raises:
        FolderInUseError: Another process holds it; the message names the owner.
        StorageError: The folder is not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise as_storage_error(error) from error
    refuse_symlinks(folder)
    lock = _acquire(folder)
    if lock is None:
        log.warning(
            "%s: the file system does not support locks; do not start another run in this folder",
            folder,
        )
        yield
        return
    try:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        owner = {"host": platform.node(), "process": os.getpid(), "since": now}
        write_json(folder / OWNER_FILE, owner)
        yield
    finally:
        lock.release()


def check_unlocked(folder: Path) -> None:
    """Check that no process holds the lock of a folder.

    Raises:
        FolderInUseError: A process holds it.
    """
    if not folder.is_dir():
        return
    refuse_symlinks(folder)
    if (folder / LOCK_FILE).exists() and (lock := _acquire(folder)) is not None:
        lock.release()


def _acquire(folder: Path) -> FileLock | None:
    """Acquire the lock of a folder; return None if the file system does not support locks."""
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise FolderInUseError(_in_use_message(folder)) from error
    except OSError as error:
        raise FolderInUseError(
            f"{folder / LOCK_FILE} cannot be locked: {error.strerror}"
        ) from error
    except NotImplementedError:
        return None
    return lock


def _in_use_message(folder: Path) -> str:
    owner = read_json(folder / OWNER_FILE)
    holder = ", ".join(f"{name} {value}" for name, value in owner.items()) or "another process"
    return (
        f"{folder} is in use by another run ({holder}); wait until it has ended, or choose "
        "another folder"
    )


@as_user_error()
def refuse_symlinks(folder: Path) -> None:
    """Check that a run folder has no symbolic links, through which files outside would be written.

    Raises:
        UserError: There is a link, or the folder cannot be read.
    """
    subfolders = [folder / name for name in RUN_SUBFOLDERS if not (folder / name).is_symlink()]
    places = [folder, *(path for path in subfolders if path.is_dir())]
    for path in (path for place in places for path in place.iterdir()):
        if path.is_symlink() and path.name != "wandb":
            raise UserError(
                f"{path} is a symbolic link, and runs never write through symbolic links; replace "
                "it with the file or folder that it points to"
            )
