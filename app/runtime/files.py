"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import pandas as pd

from app.runtime.errors import StorageError, UserError, as_storage_error, describe_read_error
from app.runtime.fault_injection import maybe_crash

FORMULA_PREFIXES = (
    "=",
    "+",
    "-",
    "@",
    "\t",
    "\r",
    "\n",
)  # with these a spreadsheet begins to compute


TEMP_SUFFIX = ".part"
MIN_FREE_BYTES = 2**20  # bytes; the configuration and the log of a run are smaller
log = logging.getLogger(__name__)


def atomic_write(
    path: Path,
    write: Callable[[BinaryIO], object],
    before_replace: Callable[[], object] | None = None,
) -> None:
    """Writes under a temporary name beside `path`, makes it durable, and renames it.

    Args:
        path: Its folder is made where it is missing.
        write: Given the open file.
        before_replace: Called when the new content is safe, before it takes the name.

    Raises:
        StorageError: It cannot be written; what was there before is still there.
    """
    partial, size = path.with_name(f".{path.name}{TEMP_SUFFIX}"), 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
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
            partial.replace(path)
            maybe_crash("after_rename", path.name)
            _fsync_folder(path.parent)
        finally:
            with suppress(OSError):  # what went wrong is told, not that nothing is left to tidy
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise _not_written(path, size, error) from error


def check_disk_space(folder: Path) -> None:
    """Tries, in a file without a name, whether there is room for more than a few lines.

    Raises:
        StorageError: There is none: the disk is full, or a quota is used up.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(MIN_FREE_BYTES))
    except OSError as error:
        head = f"{folder}: the {MIN_FREE_BYTES:,} bytes that any run needs"
        raise StorageError(f"{head} {_refuses(folder, error)}") from error


def _fsync_folder(folder: Path) -> None:
    """What has been renamed in a folder stays so even when the power fails."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _not_written(path: Path, size: int, error: OSError) -> StorageError:
    there = next(one for one in path.absolute().parents if os.path.exists(one))  # noqa: PTH110
    written = f" ({size:,} bytes)" if size else ""
    return StorageError(f"{path}{written} {_refuses(there, error)}")


def _refuses(folder: Path, error: OSError) -> str:
    free = shutil.disk_usage(folder).free
    return f"cannot be written: {error.strerror or error}; {free:,} bytes are free"


def remove_temp_files(folder: Path) -> None:
    """Takes away what a process has left behind that was killed while it wrote.

    Raises:
        StorageError: It may not be.
    """
    try:
        for partial in _temp_files(folder):
            partial.unlink()
    except OSError as error:
        raise as_storage_error(error) from error


def _temp_files(folder: Path) -> list[Path]:
    inner = [path for path in folder.iterdir() if path.is_dir()]
    own = [path for path in inner if not (path / "status.json").exists()]  # not those of other runs
    found = [
        *folder.glob(f".*{TEMP_SUFFIX}"),
        *(p for path in own for p in path.rglob(f".*{TEMP_SUFFIX}")),
    ]
    return [path for path in found if path.is_file()]


def check_writable(folder: Path, names: Iterable[str]) -> None:
    """Those that are there can be written to.

    Raises:
        StorageError: One is a folder, or not this user's to change.
    """
    for path in (folder / name for name in names):
        try:
            if path.exists():
                path.open("r+b").close()  # not `os.access`, which knows less than the system does
        except OSError as error:
            raise StorageError(f"{path} cannot be written: {error.strerror or error}") from error


def write_text(path: Path, text: str) -> None:
    """A text file, in UTF-8."""
    atomic_write(path, lambda file: file.write(text.encode()))


def write_json(path: Path, content: Any) -> None:
    """A JSON file, indented; numbers that JSON does not have (NaN, infinity) become null."""
    write_text(path, json.dumps(_nonfinite_to_none(content), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where there is none.

    Raises:
        UserError: It is damaged, or cannot be read.
    """
    try:
        if not path.exists():
            return {}
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(describe_read_error(error)) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return content


def read_status(folder: Path) -> dict[str, Any]:
    """The `status.json` of a run that goes on; nothing where it is damaged, which is said."""
    try:
        return read_json(folder / "status.json")
    except UserError as error:
        log.warning("%s; it is written anew", error)
        return {}


def _nonfinite_to_none(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _nonfinite_to_none(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_nonfinite_to_none(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """A CSV file with a header and no index; no text in it is a formula to a spreadsheet."""
    harmless = table.set_axis([_escape_formula(name) for name in table.columns], axis=1)
    texts = [n for n, kind in enumerate(table.dtypes) if not pd.api.types.is_numeric_dtype(kind)]
    for number in texts:
        before = table.iloc[:, number].tolist()
        cells = [_escape_formula(cell) for cell in before]
        if any(cell is not was for cell, was in zip(cells, before, strict=True)):
            harmless.isetitem(number, cells)
    atomic_write(path, lambda file: harmless.to_csv(file, index=False))


def _escape_formula(cell: Any) -> Any:
    """With an apostrophe where a spreadsheet would compute it, as OWASP recommends."""
    if not isinstance(cell, str):
        return cell
    if "\r" in cell:  # alone it would begin a line, as pandas puts it in no quotes
        cell = cell.replace("\r\n", "\n").replace("\r", "\n")
    if not cell.startswith(FORMULA_PREFIXES):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell
