"""Archives that a stranger may have made: what is in them is looked at before it is unpacked."""

from __future__ import annotations

import shutil
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np

from app.runtime.errors import UserError

PLAIN = 2 * 2**30  # bytes up to which nobody asks how well something was compressed
RATIO = 100  # beyond that, as many bytes may come of one; zeros alone come to a thousand
READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def unpack(archive: Path, folder: Path, names: Iterable[str], largest: int) -> None:
    """Takes files out of a `.tar.gz`; nothing else in it is read or written.

    Args:
        archive: The file.
        folder: Into which they come.
        names: The paths of the files in the archive.
        largest: Bytes that each may have.

    Raises:
        UserError: The archive is damaged, lacks a file, or has another kind of thing in its place.
    """
    wanted = set(names)
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                _check_place(archive, member)
                if member.name in wanted:
                    wanted.remove(member.name)
                    _take(archive, tar.extractfile(member), member, folder, largest)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{archive} is damaged: {error}; delete it") from error
    if wanted:
        raise UserError(f"{archive} has no file {min(wanted)}; delete it")


def _check_place(archive: Path, member: tarfile.TarInfo) -> None:
    path = Path(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{archive}: {member.name!r} would leave the folder; refused")
    if not (member.isfile() or member.isdir()):
        raise UserError(f"{archive}: {member.name!r} is a link or a device; refused")


def _take(
    archive: Path, source: IO[bytes] | None, member: tarfile.TarInfo, folder: Path, largest: int
) -> None:
    if source is None or member.size > largest:
        raise UserError(f"{archive}: {member.name!r} has {member.size:,} bytes; refused")
    target = folder / member.name
    if not target.parent.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{target.parent} is a link that leaves {folder}; refused")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)  # it may be a link
    with target.open("xb") as file:
        shutil.copyfileobj(source, file)


def check_npz(path: Path) -> None:
    """Looks at the sizes that the arrays of an `.npz` file would have.

    Raises:
        UserError: They are those of a bomb.
        zipfile.BadZipFile: It is no archive.
        ValueError: What is in it is no array, or needs to be unpickled.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        total = sum(member.file_size for member in members)
        if total > max(PLAIN, RATIO * path.stat().st_size):
            raise UserError(
                f"{path}: its {path.stat().st_size:,} bytes would become {total:,}; refused, as "
                f"that is more than {RATIO} times as many"
            )
        for member in members:
            with archive.open(member) as file:
                _check_header(path, file, member)


def _check_header(path: Path, file: IO[bytes], member: zipfile.ZipInfo) -> None:
    version = np.lib.format.read_magic(file)
    if version not in READERS:
        raise ValueError(f"{member.filename!r} is of the unknown version {version}")
    shape, _, dtype = READERS[version](file)
    size = int(np.prod([int(n) for n in shape], dtype=object)) * dtype.itemsize
    if dtype.hasobject:
        raise ValueError(f"{member.filename!r} holds objects, which would have to be unpickled")
    if size > member.file_size or min(shape, default=0) < 0:
        problem = f"{member.filename!r} says it has {size:,} bytes, but there are"
        raise UserError(f"{path}: {problem} {member.file_size:,}; refused")
