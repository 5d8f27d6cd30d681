"""One process at a time writes in a run folder; who dies lets go of it."""

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
LOCK, OWNER = ".lock", ".owner.json"


class FolderInUse(UserError):  # noqa: N818
    """Another process runs there."""


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """The folder of a run is this process's alone.

    Raises:
        FolderInUse: It is another's, which is named.
        StorageError: It cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise as_storage_error(error) from error
    refuse_symlinks(folder)
    lock = _acquire(folder)
    if lock is None:
        log.warning("%s is on a file system without locks: run nothing else there", folder)
        yield
        return
    try:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        owner = {"host": platform.node(), "process": os.getpid(), "since": now}
        write_json(folder / OWNER, owner)
        yield
    finally:
        lock.release()


def check_unlocked(folder: Path) -> None:
    """Nobody runs in that folder now.

    Raises:
        FolderInUse: Somebody does.
    """
    if not folder.is_dir():
        return
    refuse_symlinks(folder)
    if (folder / LOCK).exists() and (lock := _acquire(folder)) is not None:
        lock.release()


def _acquire(folder: Path) -> FileLock | None:
    """The lock of a folder, held; None where the file system has none."""
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise FolderInUse(_in_use_message(folder)) from error
    except OSError as error:
        raise FolderInUse(f"{folder / LOCK} cannot be locked: {error.strerror}") from error
    except NotImplementedError:
        return None
    return lock


@as_user_error()
def refuse_symlinks(folder: Path) -> None:
    """What the program writes goes into the folder, and not where a stranger's link leads.

    Raises:
        UserError: There is one, or it cannot be seen whether there is.
    """
    inner = [folder / name for name in RUN_SUBFOLDERS if not (folder / name).is_symlink()]
    places = [folder, *(path for path in inner if path.is_dir())]
    for path in (path for place in places for path in place.iterdir()):
        if path.is_symlink() and path.name != "wandb":
            raise UserError(
                f"{path} is a link; a run is written into files of its own: put there what the "
                "link leads to"
            )


def _in_use_message(folder: Path) -> str:
    owner = read_json(folder / OWNER)
    by = ", ".join(f"{name} {value}" for name, value in owner.items()) or "another process"
    return f"{folder} is in use: a run goes on there ({by}); it is not disturbed"
