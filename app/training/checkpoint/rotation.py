"""Keep the newest training checkpoints of a run: `last.safetensors`, `last-1.safetensors`, ..."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from app.runtime.errors import UserError, as_user_error
from app.runtime.fault_injection import maybe_crash
from app.runtime.files import atomic_write
from app.training.checkpoint.header import read_info, verify_checksum

log = logging.getLogger(__name__)
CHECKPOINT_DIR = "checkpoints"
SUFFIX = ".safetensors"
LAST_CHECKPOINT = f"last{SUFFIX}"
BEST_CHECKPOINT = f"best{SUFFIX}"


class CheckpointRotation:
    """Keep the newest training checkpoints of a run.

    Args:
        folder: Run folder.
        keep: How many training checkpoints to keep.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = (folder / CHECKPOINT_DIR).resolve(), keep
        self.valid: list[Path] = []  # newest first

    def resume_from(self, file: Path) -> None:
        """Keep this file and older ones; newer files are removed by the next write."""
        file, checkpoints = file.resolve(), list_checkpoints(self.folder.parent)
        older = checkpoints[checkpoints.index(file) + 1 :] if file in checkpoints else []
        self.valid = [file, *older] if file in checkpoints else []

    def write(self, write: Callable[[BinaryIO], object]) -> None:
        """Write a new `last.safetensors`, rename the previous ones and remove those no longer kept.

        Args:
            write: Writes the checkpoint to the open file it is given.
        """
        atomic_write(self.folder / LAST_CHECKPOINT, write, self._rotate)
        self.valid = [self.folder / LAST_CHECKPOINT, *self.valid]
        for path in _checkpoint_files(self.folder.parent):
            if path not in self.valid:
                maybe_crash("before_remove_old", path.name)
                remove_file(path)

    def _rotate(self) -> None:
        """Rename each kept checkpoint to the next higher number, starting with the oldest."""
        moved: list[Path] = []
        kept = self.valid[: self.keep - 1]
        for number, path in reversed(list(enumerate(kept, start=1))):
            target = self.folder / rotated_name(number)
            maybe_crash("before_move_old", path.name)
            try:
                path.replace(target)
            except OSError as error:
                log.warning("%s cannot be renamed to %s: %s", path, target.name, error.strerror)
            else:
                moved.insert(0, target)
        self.valid = moved


def rotated_name(number: int) -> str:
    """Return the file name of the checkpoint saved `number` checkpoints before the last."""
    return f"last-{number}{SUFFIX}" if number else LAST_CHECKPOINT


def latest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest undamaged training checkpoint of a run folder.

    Returns:
        The file, or None if there is none; and what is wrong with each newer file.
    """
    problems: list[str] = []
    for path in list_checkpoints(folder):
        try:
            if verify_checksum(path).kind == "state":
                return path, problems
            problems.append(f"{path} contains weights only")
        except UserError as error:
            problems.append(str(error))
    return None, problems


def find_checkpoint(path: Path, key: str = "ckpt") -> Path:
    """Return the file itself, or the best checkpoint of a run folder, or else its last.

    Args:
        path: A file or a run folder.
        key: Key of the configuration that names it, for errors.

    Raises:
        UserError: The folder contains no checkpoint.
    """
    if path.is_file():
        return path
    candidates = [path / CHECKPOINT_DIR / BEST_CHECKPOINT, *list_checkpoints(path)]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        raise UserError(
            f"{key}={str(path)!r} contains no checkpoint: no {CHECKPOINT_DIR}/{BEST_CHECKPOINT} "
            f"or {LAST_CHECKPOINT}"
        )
    return found


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the `last*.safetensors` files of a run folder, the newest first.

    They are sorted by the sequence number inside, because files may have been swapped; a damaged
    file without a readable number is sorted by its name.

    Raises:
        UserError: The folder cannot be read.
    """
    numbers: dict[Path, float] = {}
    previous = 0.0
    for path in sorted(_checkpoint_files(folder), key=_age_in_name, reverse=True):
        previous = numbers[path] = _sequence_number(path) or previous + 0.5
    return sorted(numbers, key=lambda path: -numbers[path])


@as_user_error()
def _checkpoint_files(folder: Path) -> list[Path]:
    inside = folder / CHECKPOINT_DIR
    # Unlike iterdir(), glob() finds nothing in a folder without read permission.
    paths = inside.iterdir() if inside.is_dir() else ()
    pattern = re.compile(rf"last(-\d+)?{re.escape(SUFFIX)}")
    return [path for path in paths if pattern.fullmatch(path.name) and path.is_file()]


def _age_in_name(path: Path) -> int:
    return int(path.stem.removeprefix("last-")) if "-" in path.stem else 0


def _sequence_number(path: Path) -> int | None:
    try:
        info = read_info(path)
    except UserError:
        return None
    return info.number if info.kind == "state" else None


def remove_file(path: Path) -> None:
    """Remove a file that is no longer needed; failure is only a warning."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s cannot be removed: %s", path, error.strerror)
