"""Files of `torch.save`, read as tensors and plain values: nothing in them is executed."""

from __future__ import annotations

import stat
import struct
import sys
import zipfile
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from app.runtime.errors import UserError
from app.training.checkpoint.pickle_reader import read_pickle
from app.training.checkpoint.tensor_reader import ForbiddenContentError, shorten

# What zipfile raises for files with wrong bits.
READ_ERRORS = (
    zipfile.BadZipFile,
    EOFError,
    OSError,
    ValueError,
    RuntimeError,
    OverflowError,
    struct.error,
)
BLOCK = 2**20  # bytes read at once
FORBIDDEN = 0x1 | 0x40  # flags of an entry that is encrypted


def load_plain(file: Path) -> Any:
    """What `torch.save` wrote, if that is tensors and plain values; the tensors on the host.

    The file is opened once and read by one reader, which calls nothing that the file names and
    asks for no more memory than the file is long, but for a few hundred bytes for each value.

    Args:
        file: A zip file, its entries stored as they are.

    Raises:
        UserError: It is missing, damaged, or holds anything else.
    """
    refuse_distributed(file)
    try:
        with file.open("rb") as opened:
            archive = _opened(file, opened)
            return _value(file, archive)
    except OSError as error:
        raise UserError(f"{file} is truncated or no checkpoint: {error}") from error


def refuse_distributed(path: Path) -> None:
    """Checkpoints of `torch.distributed.checkpoint` are pickles that run whatever they name.

    Raises:
        UserError: The path is one, or a file of one.
    """
    if path.name == ".metadata" or path.suffix == ".distcp" or (path / ".metadata").exists():
        raise UserError(
            f"{path} is of torch.distributed.checkpoint, whose .metadata is a pickle that can run "
            "code; it is not read"
        )


def _opened(file: Path, opened: BinaryIO) -> zipfile.ZipFile:
    try:
        archive = zipfile.ZipFile(opened)
    except READ_ERRORS as error:
        raise UserError(f"{file} is truncated or no checkpoint: {shorten(str(error))}") from error
    entries = archive.infolist()
    size = opened.seek(0, 2)
    wrong = [f"{shorten(entry.filename)} {what}" for entry in entries if (what := _odd(entry))]
    if wrong:
        raise UserError(f"{file} is damaged: {wrong[0]}")
    if len({entry.filename for entry in entries}) < len(entries):
        raise UserError(f"{file} is damaged: two entries have the same name")
    if sum(entry.file_size for entry in entries) > size:
        raise UserError(f"{file} is damaged: its entries are larger than the file")
    return archive


def _odd(entry: zipfile.ZipInfo) -> str | None:
    """What makes it an entry that no checkpoint has."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        return "is compressed"
    if entry.flag_bits & FORBIDDEN:
        return "is encrypted"
    if stat.S_ISLNK(entry.external_attr >> 16):
        return "is a link"
    parts = entry.filename.replace("\\", "/").split("/")
    if ".." in parts or "" in parts[:-1] or ":" in parts[0]:
        return "lies outside the archive"
    return None


def _value(file: Path, archive: zipfile.ZipFile) -> Any:
    names = archive.namelist()
    top = names[0].partition("/")[0] if names else ""
    order = f"{top}/byteorder"
    if f"{top}/data.pkl" not in names:
        raise UserError(f"{file} is damaged: it has no data.pkl")

    @cache
    def record(key: str) -> Tensor:
        return _record(archive, f"{top}/data/{key}")

    try:
        if order in names and archive.read(order) != sys.byteorder.encode():
            raise UserError(f"{file} was written where bytes are ordered otherwise")
        return read_pickle(archive.read(f"{top}/data.pkl"), record)
    except UserError:
        raise
    except ForbiddenContentError as error:
        raise UserError(
            f"{file} holds more than tensors and plain values; refused: {error}"
        ) from error
    except READ_ERRORS as error:
        raise UserError(f"{file} is damaged: {_reason(error)}") from error


def _record(archive: zipfile.ZipFile, name: str) -> Tensor:
    content = torch.empty(archive.getinfo(name).file_size, dtype=torch.uint8)
    view, start = content.numpy().data, 0
    with archive.open(name) as entry:
        while block := entry.read(BLOCK):
            view[start : start + len(block)] = block
            start += len(block)
    return content


def _reason(error: Exception) -> str:
    return shorten(str(error).replace("Bad CRC-32", "wrong checksum")) or type(error).__name__
