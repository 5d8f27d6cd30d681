"""Read files of `torch.save` that contain only tensors and plain values, without executing any."""

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
from app.training.checkpoint.checksum import BLOCK_SIZE
from app.training.checkpoint.pickle_reader import read_pickle
from app.training.checkpoint.tensor_reader import ForbiddenContentError, printable

# Raised by zipfile for damaged files.
READ_ERRORS = (
    zipfile.BadZipFile,
    EOFError,
    OSError,
    ValueError,
    RuntimeError,
    OverflowError,
    struct.error,
)
ENCRYPTED = 0x1 | 0x40  # flag bits of an encrypted entry


def load_plain(file: Path) -> Any:
    """Load a file of `torch.save` with tensors on the CPU, if it has only tensors and plain values.

    Nothing that the file names is called. Beyond the size of the file, reading it takes at most a
    few hundred bytes of memory for each value.

    Args:
        file: A zip file with uncompressed entries.

    Raises:
        UserError: The file is missing, damaged, or contains anything else.
    """
    refuse_distributed(file)
    try:
        with file.open("rb") as opened:
            archive = _open_archive(file, opened)
            return _read_value(file, archive)
    except OSError as error:
        raise UserError(f"{file} is truncated or not a checkpoint: {error}") from error


def refuse_distributed(path: Path) -> None:
    """Refuse checkpoints of `torch.distributed.checkpoint`, whose pickles can run code.

    Raises:
        UserError: The path is such a folder, or a file in one.
    """
    if path.name == ".metadata" or path.suffix == ".distcp" or (path / ".metadata").exists():
        raise UserError(
            f"{path} is a torch.distributed.checkpoint, whose .metadata is a pickle that can run "
            "code; it is not read"
        )


def _open_archive(file: Path, opened: BinaryIO) -> zipfile.ZipFile:
    try:
        archive = zipfile.ZipFile(opened)
    except READ_ERRORS as error:
        raise UserError(
            f"{file} is truncated or not a checkpoint: {printable(str(error))}"
        ) from error
    entries = archive.infolist()
    size = opened.seek(0, 2)
    problems = [f"{printable(e.filename)} {problem}" for e in entries if (problem := _problem(e))]
    if problems:
        raise UserError(f"{file} is damaged: {problems[0]}")
    if len({entry.filename for entry in entries}) < len(entries):
        raise UserError(f"{file} is damaged: two entries have the same name")
    if sum(entry.file_size for entry in entries) > size:
        raise UserError(f"{file} is damaged: its entries are larger than the file")
    return archive


def _problem(entry: zipfile.ZipInfo) -> str | None:
    """Return why a checkpoint cannot have this entry; None if it can."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        return "is compressed"
    if entry.flag_bits & ENCRYPTED:
        return "is encrypted"
    if stat.S_ISLNK(entry.external_attr >> 16):
        return "is a link"
    parts = entry.filename.replace("\\", "/").split("/")
    if ".." in parts or "" in parts[:-1] or ":" in parts[0]:
        return "points outside the archive"
    return None


def _read_value(file: Path, archive: zipfile.ZipFile) -> Any:
    names = archive.namelist()
    top = names[0].partition("/")[0] if names else ""
    byte_order = f"{top}/byteorder"
    if f"{top}/data.pkl" not in names:
        raise UserError(f"{file} is damaged: it has no data.pkl")

    @cache
    def storage_bytes(key: str) -> Tensor:
        return _read_bytes(archive, f"{top}/data/{key}")

    try:
        if byte_order in names and archive.read(byte_order) != sys.byteorder.encode():
            raise UserError(f"{file} was written on a machine with another byte order")
        return read_pickle(archive.read(f"{top}/data.pkl"), storage_bytes)
    except UserError:
        raise
    except ForbiddenContentError as error:
        raise UserError(
            f"{file} contains more than tensors and plain values; refused: {error}"
        ) from error
    except READ_ERRORS as error:
        raise UserError(f"{file} is damaged: {_reason(error)}") from error


def _read_bytes(archive: zipfile.ZipFile, name: str) -> Tensor:
    content = torch.empty(archive.getinfo(name).file_size, dtype=torch.uint8)
    view, start = content.numpy().data, 0
    with archive.open(name) as entry:
        while block := entry.read(BLOCK_SIZE):
            view[start : start + len(block)] = block
            start += len(block)
    return content


def _reason(error: Exception) -> str:
    return printable(str(error).replace("Bad CRC-32", "wrong checksum")) or type(error).__name__
