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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.runtime.errors import UserError, describe_read_error

if TYPE_CHECKING:
    import pandas as pd

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
        target = Path(os.path.realpath(path, strict=True))
        if not target.is_relative_to(folder.resolve()):
            raise UserError(f"{path} is a link out of the folder, to {target}")
        if special := describe_special_file(target):
            raise UserError(f"{path} is {special}; allowed: a regular file")
        with os.fdopen(os.open(target, OPEN_FLAGS), "rb") as file:
            size, content = target.stat().st_size, file.read(max_bytes + 1)
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


def read_csv(folder: Path, name: str) -> pd.DataFrame:
    """Return the table in a CSV file of a folder, or an empty one if there is no such file.

    Raises:
        UserError: The file cannot be read, is too large or damaged.
    """
    text = read_small_file(folder, name) or ""
    if not text.strip():
        return _empty_table()
    try:
        problem = _csv_problem(text)
        if problem is None:
            return _parse_table(text)
    except (ValueError, csv.Error) as error:
        problem = " ".join(str(error).split())
    raise UserError(f"{folder / name} is damaged: {problem}")


def _csv_problem(text: str) -> str | None:
    """Return why a table is not parsed; pandas needs minutes for a row that is too long."""
    if text.count(",") + text.count("\n") > MAX_SMALL_FILE_VALUES:
        return f"it contains more than {MAX_SMALL_FILE_VALUES:,} values"
    widths = {len(row) for row in csv.reader(io.StringIO(text)) if row}
    if len(widths) > 1:
        return f"its rows have from {min(widths):,} to {max(widths):,} values"
    is_wide = max(widths, default=0) > MAX_COLUMNS
    return f"it has more than {MAX_COLUMNS:,} columns" if is_wide else None


def _parse_table(text: str) -> pd.DataFrame:
    import pandas as pd

    return pd.read_csv(io.StringIO(text))


def _empty_table() -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame()
