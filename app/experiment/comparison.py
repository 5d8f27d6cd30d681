"""Compare the results of two runs: all values of the tables but times, and the bits of weights."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Collection, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from app.config.schema import STAGES
from app.runtime.errors import UserError, as_user_error
from app.runtime.small_files import OPEN_FLAGS, describe_special_file
from app.training.checkpoint.checkpoint import load_checkpoint
from app.training.checkpoint.rotation import BEST_CHECKPOINT, CHECKPOINT_DIR, LAST_CHECKPOINT

MAX_LINE_BYTES = 2**20
# Columns that depend on the machine and its load.
MEASURED_COLUMNS = ("iter_time", "data_time", "epoch_time", "samples/s", "memory_mb")
MISSING = "nothing"


@dataclass(frozen=True)
class Difference:
    """The first value in which two runs differ.

    Attributes:
        where: File and place in it.
        values: The value in each of the runs, as text.
    """

    where: str
    values: tuple[str, str]


def compare_tables(first: Path, second: Path) -> tuple[int, Difference | None]:
    """Compare the tables of two run folders in the order in which they were written.

    Returns:
        Number of files, and the first difference.

    Raises:
        UserError: A file cannot be read.
    """
    names = sorted(set(_list_tables(first)) | set(_list_tables(second)), key=_table_order)
    for name in names:
        existing = [(folder / name).exists() for folder in (first, second)]
        if not all(existing):
            one, other = ("a file" if exists else MISSING for exists in existing)
            return len(names), Difference(name, (one, other))
        if difference := _compare_table(first, second, name):
            return len(names), difference
    return len(names), None


def _list_tables(folder: Path) -> Iterator[str]:
    for path in [*folder.glob("epoch_details/epoch*.csv"), *folder.glob("*summary_table.csv")]:
        yield path.relative_to(folder).as_posix()


def _table_order(name: str) -> tuple[bool, int, int, str]:
    """Sort by epoch and stage, and the summaries last."""
    match = re.search(r"epoch(\d+)_([a-z]+)", name)
    if match is None:
        return True, 0, 0, name
    stage = STAGES.index(match[2]) if match[2] in STAGES else len(STAGES)
    return False, int(match[1][:18]), stage, name


def _compare_table(first: Path, second: Path, name: str) -> Difference | None:
    header: list[str] = []
    no_row: list[str] = []
    with closing(_iter_rows(first / name)) as rows, closing(_iter_rows(second / name)) as others:
        for number, pair in enumerate(zip_longest(rows, others, fillvalue=no_row)):
            header = header or max(pair, key=len)
            skipped = MEASURED_COLUMNS if number > 0 else ()
            if found := _compare_rows(header, *pair, skipped):
                column, values = found
                place = f"row {number}" if number > 0 else "header"
                return Difference(f"{name}, {place}, column {column}", values)
    return None


def _compare_rows(
    header: list[str], row: list[str], other: list[str], skipped: Collection[str]
) -> tuple[str, tuple[str, str]] | None:
    """Return the first column in which two rows differ, and both values."""
    columns = [*header, *map(str, range(len(header) + 1, max(len(row), len(other)) + 1))]
    for column, *values in zip_longest(columns, row, other, fillvalue=MISSING):
        if values[0] != values[1] and column not in skipped:
            return column, (values[0], values[1])
    return None


def _iter_rows(path: Path) -> Generator[list[str], None, None]:
    """Yield the rows of a CSV file, which may come from someone else and is not read at once."""
    if special := describe_special_file(path):
        raise UserError(f"{path} is {special}; allowed: a regular file")
    with as_user_error(), os.fdopen(os.open(path, OPEN_FLAGS), "rb") as file:
        try:
            yield from csv.reader(_iter_lines(path, file))
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path} is damaged: {error}") from error


def _iter_lines(path: Path, file: BinaryIO) -> Iterator[str]:
    while line := file.readline(MAX_LINE_BYTES):
        if len(line) == MAX_LINE_BYTES:
            raise UserError(f"{path} is damaged: a line has over {MAX_LINE_BYTES:,} bytes")
        yield line.decode()


def compare_weights(first: Path, second: Path) -> tuple[int, Difference | None]:
    """Compare the weights of the last and of the best checkpoint of two run folders bit by bit.

    Returns:
        Number of tensors, and the first difference.

    Raises:
        UserError: A checkpoint cannot be read.
    """
    count = 0
    for name in (LAST_CHECKPOINT, BEST_CHECKPOINT):
        file = f"{CHECKPOINT_DIR}/{name}"
        weights, others = load_checkpoint(first / file).model, load_checkpoint(second / file).model
        count += len(weights)
        for key in [*weights, *(key for key in others if key not in weights)]:
            kinds = _kind(weights.get(key)), _kind(others.get(key))
            if kinds[0] != kinds[1]:
                return count, Difference(f"{file}, {key}", kinds)
        for key, tensor in weights.items():
            if found := _compare_tensors(tensor, others[key]):
                place, values = found
                return count, Difference(f"{file}, {key}{place}", values)
    return count, None


def _kind(tensor: Tensor | None) -> str:
    return MISSING if tensor is None else f"{tensor.dtype} {[*tensor.shape]}"


def _compare_tensors(one: Tensor, other: Tensor) -> tuple[list[int], tuple[str, str]] | None:
    """Return the first place in which two tensors of one shape differ, and both values."""
    one_bytes, other_bytes = (_bytes_of(tensor) for tensor in (one, other))
    if torch.equal(one_bytes, other_bytes):
        return None
    differs = (one_bytes != other_bytes).any(dim=1)
    index = int(differs.nonzero()[0])
    place = [int(number) for number in torch.unravel_index(torch.tensor(index), one.shape)]
    values = [repr(tensor.flatten()[index].item()) for tensor in (one, other)]
    more = f" ({int(differs.sum()):,} of {one.numel():,} values differ)"
    return place, (values[0], f"{values[1]}{more}")


def _bytes_of(tensor: Tensor) -> Tensor:
    """Return the bytes of each value, shape (N, size of a value): NaN is then equal to itself."""
    return tensor.contiguous().reshape(-1, 1).view(torch.uint8)
