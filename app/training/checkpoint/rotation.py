"""The states of a run that training can go on from: `last.pt`, and those before it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from app.runtime.errors import UserError, as_user_error
from app.runtime.fault_injection import maybe_crash
from app.runtime.files import atomic_write
from app.training.checkpoint.checksum import read_info, verify_checksum

log = logging.getLogger(__name__)
CHECKPOINT_DIR = "checkpoints"
LAST_CHECKPOINT = "last.pt"


def rotated_name(number: int) -> str:
    """`last-1.pt` is the state before `last.pt`."""
    return f"last-{number}.pt" if number else LAST_CHECKPOINT


def list_checkpoints(folder: Path) -> list[Path]:
    """The files of a run folder that may hold a state, the newest first.

    They say themselves which they are, since files can be swapped; where one does not, because it
    is damaged, its name does.

    Raises:
        UserError: The folder cannot be read.
    """
    numbers: dict[Path, float] = {}
    before_it = 0.0
    for path in sorted(_files(folder), key=_place, reverse=True):
        before_it = numbers[path] = _number(path) or before_it + 0.5
    return sorted(numbers, key=lambda path: -numbers[path])


@as_user_error()
def _files(folder: Path) -> list[Path]:
    inside = folder / CHECKPOINT_DIR
    every = inside.iterdir() if inside.is_dir() else ()  # glob would find nothing where it may not
    return [
        path for path in every if re.fullmatch(r"last(-\d+)?\.pt", path.name) and path.is_file()
    ]


def _place(path: Path) -> int:
    return int(path.stem.removeprefix("last-")) if "-" in path.stem else 0


def _number(path: Path) -> int | None:
    """Which of the run's states it is; None where it does not say."""
    try:
        seal = read_info(path)
    except UserError:
        return None
    return seal.number if seal.kind == "state" else None


def latest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest state that is whole.

    Args:
        folder: Of the run.

    Returns:
        Its file, None where there is none; and what is wrong with those that are newer.
    """
    problems: list[str] = []
    for path in list_checkpoints(folder):
        try:
            if verify_checksum(path).kind == "state":
                return path, problems
            problems.append(f"{path} holds weights alone")
        except UserError as error:
            problems.append(str(error))
    return None, problems


class CheckpointRotation:
    """Keeps the newest states.

    Args:
        folder: Of the run.
        keep: How many.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = (folder / CHECKPOINT_DIR).resolve(), keep
        self.valid: list[Path] = []  # the newest first

    def resume_from(self, file: Path) -> None:
        """A run goes on from there: it stays, and what is older; what is newer has its day."""
        file, every = file.resolve(), list_checkpoints(self.folder.parent)
        older = every[every.index(file) + 1 :] if file in every else []
        self.valid = [file, *older] if file in every else []

    def write(self, write: Callable[[BinaryIO], object]) -> None:
        """A further state; the one that was the newest is now the one before."""
        atomic_write(self.folder / LAST_CHECKPOINT, write, self._rotate)
        self.valid = [self.folder / LAST_CHECKPOINT, *self.valid]
        for path in _files(self.folder.parent):
            if path not in self.valid:
                maybe_crash("before_old_goes", path.name)
                remove_file(path)

    def _rotate(self) -> None:
        """From the oldest on each takes the name of the one before it."""
        moved: list[Path] = []
        kept = self.valid[: self.keep - 1]
        for number, path in reversed(list(enumerate(kept, start=1))):
            older = self.folder / rotated_name(number)
            maybe_crash("before_old_moves", path.name)
            try:
                path.replace(older)
            except OSError as error:
                log.warning("%s cannot be kept as %s: %s", path, older.name, error.strerror)
            else:
                moved.insert(0, older)
        self.valid = moved


def remove_file(path: Path) -> None:
    """A file that has had its day; training goes on where that cannot be."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s cannot be removed: %s", path, error.strerror)
