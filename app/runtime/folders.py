"""Hold the folder of a run, so that nothing grows in its place when it is deleted or moved."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.runtime.errors import StorageError, UserError, as_storage_error

_held: dict[Path, os.stat_result] = {}  # what is at each path that this process holds


@contextmanager
def held_folder(folder: Path) -> Iterator[None]:
    """Let `make_folder` fail below a folder once it has been deleted, moved or replaced.

    Raises:
        StorageError: The folder does not exist, or an error is raised inside the `with` block and
            the folder is no longer there.
    """
    if not is_in_place(folder):
        raise _gone_error(folder)
    descriptor: int | None = None
    try:
        if os.name == "posix":
            # Keeps a new folder from getting the same number in the file system.
            descriptor = os.open(folder, os.O_RDONLY)
        status = folder.stat()
    except OSError as error:
        raise as_storage_error(error) from error
    # The resolved path, too, because both are used to write files.
    added = {folder.absolute(), folder.resolve()} - _held.keys()
    _held.update(dict.fromkeys(added, status))
    try:
        yield
    except (OSError, UserError) as error:
        if is_in_place(folder):
            raise
        raise _gone_error(folder) from error
    finally:
        for path in added:
            del _held[path]
        if descriptor is not None:
            os.close(descriptor)


def _gone_error(folder: Path) -> StorageError:
    return StorageError(
        f"{folder} cannot be written: it was deleted, moved or replaced while it was in use"
    )


def is_in_place(folder: Path) -> bool:
    """Return whether a path still leads to the folder that this process holds, if it does."""
    status = _held.get(folder.absolute())
    try:
        return status is None or os.path.samestat(folder.stat(), status)
    except OSError:
        return False


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, if missing, but never a folder that this process holds.

    Raises:
        OSError: It cannot be created, or would be in a held folder that is no longer in place.
    """
    family = [folder.absolute(), *folder.absolute().parents]
    held = [path for path in family if path in _held]
    for path in held:
        if not is_in_place(path):
            problem = "the folder was deleted, moved or replaced while it was in use"
            raise FileNotFoundError(errno.ENOENT, problem, str(path))
    if not held:
        folder.mkdir(parents=True, exist_ok=True)
        return
    for path in reversed(family[: family.index(held[0])]):
        path.mkdir(exist_ok=True)
