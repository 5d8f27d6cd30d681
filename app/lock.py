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

from app.config.errors import UserError
from app.files import read_json, write_json

log = logging.getLogger(__name__)
LOCK, OWNER = ".lock", ".owner.json"


class FolderInUse(UserError):  # noqa: N818
    """Another process runs there."""


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """The folder of a run is this process's alone.

    Raises:
        FolderInUse: It is another's, which is named.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise FolderInUse(_taken(folder)) from error
    except NotImplementedError:
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


def check_free(folder: Path) -> None:
    """Nobody runs in that folder now.

    Raises:
        FolderInUse: Somebody does.
    """
    if not (folder / LOCK).exists():
        return
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise FolderInUse(_taken(folder)) from error
    except NotImplementedError:
        return
    lock.release()


def _taken(folder: Path) -> str:
    owner = read_json(folder / OWNER)
    by = ", ".join(f"{name} {value}" for name, value in owner.items()) or "another process"
    return f"{folder} is in use: a run goes on there ({by}); it is not disturbed"
