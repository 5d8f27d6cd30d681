"""Read and write files atomically, so that they are complete or absent."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from app.runtime.errors import StorageError, UserError, as_storage_error
from app.runtime.fault_injection import maybe_crash
from app.runtime.folders import make_folder
from app.runtime.small_files import read_json

if TYPE_CHECKING:
    import pandas as pd

FORMULA_PREFIXES = ("=", "+", "-", "@", "\t", "\r", "\n")  # start a formula in spreadsheets
TEMP_SUFFIX = ".part"
MIN_FREE_BYTES = 2**20  # more than the configuration and the log of a run
log = logging.getLogger(__name__)


def atomic_write(
    path: Path,
    write: Callable[[BinaryIO], object],
    before_replace: Callable[[], object] | None = None,
) -> None:
    """Write a temporary file next to `path`, flush it to disk, and rename it.

    Args:
        path: Target file; its folder is created if missing.
        write: Receives the open file.
        before_replace: Called when the new content is on disk, before the file is renamed.

    Raises:
        StorageError: The file cannot be written; an existing file is unchanged.
    """
    temp_file, size = path.with_name(f".{path.name}{TEMP_SUFFIX}"), 0
    try:
        make_folder(path.parent)
        temp_file.unlink(missing_ok=True)
        try:
            with temp_file.open("xb") as file:  # never through a link of that name
                maybe_crash("opened", path.name)
                write(file)
                size = file.tell()
                maybe_crash("before_fsync", path.name)
                file.flush()
                os.fsync(file.fileno())
            maybe_crash("after_fsync", path.name)
            if before_replace is not None:
                before_replace()
            maybe_crash("before_rename", path.name)
            temp_file.replace(path)
            maybe_crash("after_rename", path.name)
            _fsync_folder(path.parent)
        finally:
            with suppress(OSError):  # a failed cleanup must not hide the original error
                temp_file.unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(path, size, error) from error


def _fsync_folder(folder: Path) -> None:
    """Flush renames in a folder to disk, so that they survive a power failure."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def storage_error(path: Path, size: int, error: OSError) -> StorageError:
    """Return the error for a file of some bytes that could not be written; 0 if that is unknown."""
    folder = next(parent for parent in path.absolute().parents if os.path.exists(parent))  # noqa: PTH110
    written = f" ({size:,} bytes)" if size else ""
    return StorageError(f"{path}{written} {_write_problem(folder, error)}")


def _write_problem(folder: Path, error: OSError) -> str:
    free = shutil.disk_usage(folder).free
    return f"cannot be written: {error.strerror or error}; {free:,} bytes are free"


def check_disk_space(planned: Path) -> None:
    """Check, with an unnamed temporary file, that there is room for the files of any run.

    Args:
        planned: The run folder, which may not exist yet.

    Raises:
        StorageError: Nothing can be written there, the disk is full or a quota is exhausted.
    """
    folder = next(parent for parent in (planned, *planned.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(MIN_FREE_BYTES))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            problem = f"{folder} does not take files: {error.strerror}"
            raise StorageError(f"{planned} cannot be created: {problem}") from error
        head = f"{folder}: the {MIN_FREE_BYTES:,} bytes that every run needs"
        raise StorageError(f"{head} {_write_problem(folder, error)}") from error


def check_writable(folder: Path, names: Iterable[str]) -> None:
    """Check that the existing files among `names` can be written.

    Raises:
        StorageError: One of them is a folder or not writable for this user.
    """
    for path in (folder / name for name in names):
        try:
            if path.exists():
                path.open("r+b").close()  # `os.access` would miss read-only file systems and ACLs
        except OSError as error:
            raise StorageError(f"{path} cannot be written: {error.strerror or error}") from error


def remove_temp_files(folder: Path) -> None:
    """Delete the temporary files of a process that was killed while writing.

    Raises:
        StorageError: One of them cannot be deleted.
    """
    try:
        for temp_file in _temp_files(folder):
            temp_file.unlink()
    except OSError as error:
        raise as_storage_error(error) from error


def _temp_files(folder: Path) -> list[Path]:
    subfolders = [path for path in folder.iterdir() if path.is_dir()]
    # A subfolder with a status is another run, which may be writing now.
    own = [path for path in subfolders if not (path / "status.json").exists()]
    found = [
        *folder.glob(f".*{TEMP_SUFFIX}"),
        *(p for path in own for p in path.rglob(f".*{TEMP_SUFFIX}")),
    ]
    return [path for path in found if path.is_file()]


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8."""
    atomic_write(path, lambda file: file.write(text.encode()))


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON; NaN and infinity, which JSON does not have, become null."""
    write_text(path, json.dumps(_nonfinite_to_none(content), indent=2, allow_nan=False) + "\n")


def read_status(folder: Path) -> dict[str, Any]:
    """Return the `status.json` of a run; log a warning and return an empty dict if damaged."""
    try:
        return read_json(folder, "status.json")
    except UserError as error:
        log.warning("%s; it will be overwritten", error)
        return {}


def _nonfinite_to_none(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _nonfinite_to_none(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_nonfinite_to_none(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write a CSV file with a header and no index, in which no text is a spreadsheet formula."""
    escaped = _escape_formulas(table)
    atomic_write(path, lambda file: escaped.to_csv(file, index=False))


def append_csv(path: Path, table: pd.DataFrame) -> None:
    """Append rows to a file that `write_csv` has written; it need not survive a crash.

    Raises:
        StorageError: The file is missing or cannot be written.
    """
    text = _escape_formulas(table).to_csv(index=False, header=False)
    try:
        with path.open("r+", encoding="utf-8", newline="") as file:
            file.seek(0, os.SEEK_END)
            file.write(text)
    except OSError as error:
        raise as_storage_error(error) from error


def _escape_formulas(table: pd.DataFrame) -> pd.DataFrame:
    from pandas.api.types import is_numeric_dtype

    escaped = table.set_axis([_escape_formula(name) for name in table.columns], axis=1)
    text_columns = [
        index for index, dtype in enumerate(table.dtypes) if not is_numeric_dtype(dtype)
    ]
    for index in text_columns:
        cells = table.iloc[:, index].tolist()
        escaped_cells = [_escape_formula(cell) for cell in cells]
        if any(new is not old for new, old in zip(escaped_cells, cells, strict=True)):
            escaped.isetitem(index, escaped_cells)
    return escaped


def _escape_formula(cell: Any) -> Any:
    """Prefix text that a spreadsheet would evaluate with an apostrophe, as OWASP recommends."""
    if not isinstance(cell, str):
        return cell
    if "\r" in cell:  # pandas does not quote it, and a lone \r would start a new line
        cell = cell.replace("\r\n", "\n").replace("\r", "\n")
    if not cell.startswith(FORMULA_PREFIXES):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell
