"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pandas as pd

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")  # with these a spreadsheet begins to compute


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes under a temporary name beside `path`, makes it durable, and renames it.

    Args:
        path: Its folder is made where it is missing.
        write: Given the open file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A text file, in UTF-8."""
    write_whole(path, lambda file: file.write(text.encode()))


def write_json(path: Path, content: Any) -> None:
    """A JSON file, indented; numbers that JSON does not have (NaN, infinity) become null."""
    write_text(path, json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """A CSV file with a header and no index; no text in it is a formula to a spreadsheet."""
    harmless = table.set_axis([_harmless(name) for name in table.columns], axis=1)
    texts = [n for n, kind in enumerate(table.dtypes) if not pd.api.types.is_numeric_dtype(kind)]
    for number in texts:
        before = table.iloc[:, number].tolist()
        cells = [_harmless(cell) for cell in before]
        if any(cell is not was for cell, was in zip(cells, before, strict=True)):
            harmless.isetitem(number, cells)
    write_whole(path, lambda file: harmless.to_csv(file, index=False))


def _harmless(cell: Any) -> Any:
    """With an apostrophe where a spreadsheet would compute it, as OWASP recommends."""
    if not isinstance(cell, str):
        return cell
    if "\r" in cell:  # alone it would begin a line, as pandas puts it in no quotes
        cell = cell.replace("\r\n", "\n").replace("\r", "\n")
    if not cell.startswith(FORMULA):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell
