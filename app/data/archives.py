"""Safe reading of archives from untrusted sources: members are checked before they are unpacked."""

from __future__ import annotations

import shutil
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np

from app.runtime.errors import UserError

MAX_UNCHECKED_BYTES = 2 * 2**30  # uncompressed size up to which any compression ratio is allowed
MAX_COMPRESSION_RATIO = 100  # above that size; an array of zeros reaches about 1000
HEADER_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def unpack(archive: Path, folder: Path, names: Iterable[str], max_bytes: int) -> None:
    """Extract the named files from a `.tar.gz`; nothing else in it is written.

    Args:
        archive: Path of the archive.
        folder: Destination folder.
        names: Paths of the wanted files inside the archive.
        max_bytes: Maximum size of each file.

    Raises:
        UserError: The archive is damaged, a wanted file is missing or too large, or a member is a
            link, a device, or points outside the destination.
    """
    missing = set(names)
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                _check_member(archive, member)
                if member.name in missing:
                    missing.remove(member.name)
                    _extract(archive, tar.extractfile(member), member, folder, max_bytes)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{archive} is damaged: {error}; delete it") from error
    if missing:
        raise UserError(f"{archive} is incomplete (no {min(missing)}); delete it")


def _check_member(archive: Path, member: tarfile.TarInfo) -> None:
    path = Path(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{archive}: {member.name!r} would be written outside the folder; refused")
    if not (member.isfile() or member.isdir()):
        raise UserError(f"{archive}: {member.name!r} is a link or a device; refused")


def _extract(
    archive: Path, source: IO[bytes] | None, member: tarfile.TarInfo, folder: Path, max_bytes: int
) -> None:
    if source is None or member.size > max_bytes:
        raise UserError(f"{archive}: {member.name!r} has {member.size:,} bytes; refused")
    target = folder / member.name
    if not target.parent.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{target.parent} is a link that points outside {folder}; refused")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)  # it may be a link
    with target.open("xb") as file:
        shutil.copyfileobj(source, file)


def check_npz(path: Path) -> None:
    """Check the array sizes that an `.npz` file declares, without reading the arrays.

    Raises:
        UserError: The file is a decompression bomb, or a header declares a wrong size.
        zipfile.BadZipFile: The file is not a zip archive.
        ValueError: A member is not an array, or would have to be unpickled.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        total = sum(member.file_size for member in members)
        if total > max(MAX_UNCHECKED_BYTES, MAX_COMPRESSION_RATIO * path.stat().st_size):
            raise UserError(
                f"{path}: its {path.stat().st_size:,} bytes would expand to {total:,}, more than "
                f"{MAX_COMPRESSION_RATIO} times as many; refused"
            )
        for member in members:
            with archive.open(member) as file:
                _check_header(path, file, member)


def _check_header(path: Path, file: IO[bytes], member: zipfile.ZipInfo) -> None:
    version = np.lib.format.read_magic(file)
    if version not in HEADER_READERS:
        raise ValueError(f"{member.filename!r} has the unknown format version {version}")
    shape, _, dtype = HEADER_READERS[version](file)
    size = int(np.prod([int(n) for n in shape], dtype=object)) * dtype.itemsize
    if dtype.hasobject:
        raise ValueError(f"{member.filename!r} contains objects, which would have to be unpickled")
    if size > member.file_size or min(shape, default=0) < 0:
        problem = f"{member.filename!r} declares {size:,} bytes, but contains"
        raise UserError(f"{path}: {problem} {member.file_size:,}; refused")
