"""Read the small files of a folder that may come from somebody else.

Only regular files inside the folder are opened, each only up to a limit, and nothing is returned
before its size, depth and types have been checked. Every problem is a `UserError` of one line.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import stat
from itertools import takewhile
from pathlib import Path
from typing import Any

from app.runtime.errors import UserError, describe_read_error

MAX_SMALL_FILE_BYTES = (
    16 * 2**20
)  # of a JSON or CSV file; `sweep.json` of 10,000 jobs has about 7 MB
MAX_SMALL_FILE_VALUES = 500_000  # in a JSON or CSV file
MAX_COLUMNS = 2_000  # of a CSV file
MAX_NESTING = 64  # levels of nested lists and dicts
MAX_INT_BITS = 64
SPECIAL_FILES = {
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# A link or a FIFO that replaces the file after the check is not followed, and does not block.
OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


def describe_special_file(path: Path) -> str | None:
    """Return what a path is, such as "a FIFO"; None for a regular file, or if there is none.

    Raises:
        OSError: The path cannot be examined.
    """
    try:
        return SPECIAL_FILES.get(stat.S_IFMT(path.lstat().st_mode))
    except FileNotFoundError:
        return None


def read_small_file(folder: Path, name: str, max_bytes: int = MAX_SMALL_FILE_BYTES) -> str | None:
    """Return the text of a file in a folder, or None if it does not exist.

    Args:
        folder: The folder, which links may not leave.
        name: Path of the file in the folder.
        max_bytes: The largest size.

    Raises:
        UserError: It is not a regular file in the folder, too large, not UTF-8, or unreadable.
    """
    path = folder / name
    try:
        target = _follow_links(folder, path)
        if special := describe_special_file(target):
            raise UserError(f"{path} is {special}; allowed: a regular file")
        with os.fdopen(os.open(target, OPEN_FLAGS), "rb") as file:
            size, content = os.fstat(file.fileno()).st_size, file.read(max_bytes + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(describe_read_error(error)) from error
    if len(content) > max_bytes:
        raise UserError(f"{path} has {size:,} bytes; allowed: {max_bytes:,}")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: it is not UTF-8 text") from error


def _follow_links(folder: Path, path: Path) -> Path:
    """Return the file that a path in a folder leads to.

    Raises:
        UserError: It is outside the folder.
        OSError: It does not exist, or the links cannot be followed.
    """
    inside = takewhile(lambda part: part != folder, (path, *path.parents))
    if not any(part.is_symlink() for part in inside):
        return path  # without the many system calls of `realpath`
    target = Path(os.path.realpath(path, strict=True))
    if not target.is_relative_to(folder.resolve()):
        raise UserError(f"{path} is a link out of the folder, to {target}")
    return target


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Return the object in a JSON file of a folder, or an empty dict if there is no such file.

    Raises:
        UserError: The file cannot be read, is too large or damaged, or contains anything else.
    """
    text, path = read_small_file(folder, name), folder / name
    if text is None:
        return {}
    content = parse_json(text, f"{path} is damaged", is_finite=True)
    if not isinstance(content, dict):
        found = type(content).__name__
        raise UserError(f"{path} is damaged: it contains a {found}; allowed: a JSON object")
    return content


def parse_json(
    text: str, source: str, max_values: int = MAX_SMALL_FILE_VALUES, is_finite: bool = False
) -> Any:
    """Return the plain values in a JSON text.

    Args:
        text: JSON text.
        source: Start of the error messages: what contains the text.
        max_values: The largest number of values.
        is_finite: Whether to refuse NaN and infinity.

    Raises:
        UserError: The text is not JSON, has too many values, is nested too deeply, or has numbers
            that no file of this program contains.
    """
    if sum(map(text.count, ",[{")) > max_values:
        raise UserError(f"{source}: it contains more than {max_values:,} values")
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise UserError(f"{source}: it nests values more than {MAX_NESTING} deep") from error
    except ValueError as error:
        raise UserError(f"{source}: it is not JSON: {error}") from error
    if problem := _json_problem(value, is_finite):
        raise UserError(f"{source}: it {problem}")
    return value


def _json_problem(value: Any, is_finite: bool) -> str | None:
    nodes = [value]
    for _ in range(MAX_NESTING):
        for node in nodes:
            if isinstance(node, int) and node.bit_length() > MAX_INT_BITS:
                return f"contains an integer of more than {MAX_INT_BITS} bits"
            if is_finite and isinstance(node, float) and not math.isfinite(node):
                return f"contains {node}"
        nodes = [child for node in nodes for child in _json_children(node)]
    return f"nests values more than {MAX_NESTING} deep" if nodes else None


def _json_children(node: Any) -> list[Any]:
    if isinstance(node, dict):
        return list(node.values())
    return node if isinstance(node, list) else []


def read_csv(folder: Path, name: str) -> list[list[str]]:
    """Return the rows of a CSV file of a folder, its header first; none if there is no such file.

    Raises:
        UserError: The file cannot be read, is too large or damaged.
    """
    text = read_small_file(folder, name) or ""
    try:
        return _csv_rows(text)
    except (ValueError, csv.Error) as error:
        raise UserError(f"{folder / name} is damaged: {error}") from error


def _csv_rows(text: str) -> list[list[str]]:
    if text.count(",") + text.count("\n") > MAX_SMALL_FILE_VALUES:
        raise ValueError(f"it contains more than {MAX_SMALL_FILE_VALUES:,} values")
    rows = [row for row in csv.reader(io.StringIO(text), strict=True) if row]
    widths = {len(row) for row in rows}
    if len(widths) > 1:
        raise ValueError(f"its rows have from {min(widths):,} to {max(widths):,} values")
    if max(widths, default=0) > MAX_COLUMNS:
        raise ValueError(f"it has more than {MAX_COLUMNS:,} columns")
    return rows
