"""Lock run folders, so that one process at a time writes there; a dead process holds no lock."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from app.runtime.errors import StorageError, UserError, as_user_error
from app.runtime.files import write_json
from app.runtime.folders import held_folder, make_folder
from app.runtime.small_files import describe_special_file, read_json

log = logging.getLogger(__name__)
RUN_SUBFOLDERS = (
    "checkpoints",
    "epoch_details",
    "plots",
    "logs",
    "predictions",
    ".hydra",
    "tensorboard",
    ".sweep",
)
LOCK_FILE, OWNER_FILE = ".lock", ".owner.json"
OWNER_FIELDS = ("host", "process", "since")


class FolderInUseError(UserError):
    """Another process holds the lock of the folder."""


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold a run folder, which is created if missing, and its exclusive lock.

    Raises:
        FolderInUseError: Another process holds it; the message names the owner.
        StorageError: The folder is not writable, or was deleted or moved; see `held_folder`.
    """
    refuse_special_files(folder)
    with file_lock(folder / LOCK_FILE, in_use=lambda: _in_use_error(folder)):
        now = datetime.now(UTC).isoformat(timespec="seconds")
        owner = zip(OWNER_FIELDS, (platform.node(), os.getpid(), now), strict=True)
        write_json(folder / OWNER_FILE, dict(owner))
        with held_folder(folder):
            yield


def check_unlocked(folder: Path) -> None:
    """Check that no process holds the lock of a folder.

    Raises:
        FolderInUseError: A process holds it.
    """
    refuse_special_files(folder)
    if (folder / LOCK_FILE).exists():
        with file_lock(folder / LOCK_FILE, in_use=lambda: _in_use_error(folder)):
            pass


@contextmanager
def file_lock(path: Path, in_use: Callable[[], Exception] | None = None) -> Iterator[None]:
    """Hold the exclusive lock of a file, which the system releases when the process ends.

    On a file system without locks, log a warning and continue.

    Args:
        path: Lock file; it and its folder are created if missing.
        in_use: Returns the error to raise if another process holds the lock; None to wait for it.

    Raises:
        StorageError: The file cannot be created or locked.
    """
    lock = FileLock(path)
    try:
        make_folder(path.parent)
        lock.acquire(timeout=-1 if in_use is None else 0)
    except Timeout as error:
        assert in_use is not None
        raise in_use() from error
    except OSError as error:
        raise StorageError(f"{path} cannot be locked: {error.strerror or error}") from error
    except NotImplementedError:
        log.warning(
            "%s: the file system does not support locks; do not start another run in this folder",
            path.parent,
        )
    try:
        yield
    finally:
        lock.release()


@contextmanager
def download_lock(folder: Path) -> Iterator[None]:
    """Let one process download files into a folder while others wait for it."""
    with ExitStack() as stack:
        with suppress(StorageError):  # a read-only folder is either complete or of no use
            stack.enter_context(file_lock(folder / ".download.lock"))
        yield


def _in_use_error(folder: Path) -> FolderInUseError:
    owner = read_json(folder, OWNER_FILE)
    known = {name: owner[name] for name in OWNER_FIELDS if isinstance(owner.get(name), (str, int))}
    holder = ", ".join(f"{name} {value}" for name, value in known.items()) or "another process"
    return FolderInUseError(
        f"{folder} is in use by another run ({holder}); wait until it has ended, or choose "
        "another folder"
    )


@as_user_error()
def refuse_special_files(folder: Path) -> None:
    """Check that a run folder has only regular files and folders where a run writes.

    Through a symbolic link, files outside would be written; opening a FIFO would wait forever.

    Raises:
        UserError: There is another kind of file, or the folder cannot be read.
    """
    subfolders = [folder / name for name in RUN_SUBFOLDERS if not (folder / name).is_symlink()]
    places = [path for path in (folder, *subfolders) if path.is_dir()]
    for path in (path for place in places for path in place.iterdir()):
        special = describe_special_file(path)
        if special not in (None, "a folder"):
            raise UserError(
                f"{path} is {special}, which runs do not write through; replace it with a regular "
                "file or folder"
            )
