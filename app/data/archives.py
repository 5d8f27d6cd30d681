"""Safe reading of archives from untrusted sources: members are checked before they are unpacked."""

from __future__ import annotations

import bz2
import gzip
import lzma
import math
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from app.runtime.errors import UserError, did_you_mean, join_choices

MAX_UNCHECKED_BYTES = 2 * 2**30  # uncompressed size up to which any compression ratio is allowed
MAX_COMPRESSION_RATIO = 100  # above that size; an array of zeros reaches about 1000
NPZ_DAMAGE_ERRORS = (  # raised by NumPy and zipfile for corrupt files and wrong sizes in headers
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    OSError,
    MemoryError,
    RuntimeError,
)
STREAM_DAMAGE_ERRORS = (*NPZ_DAMAGE_ERRORS, lzma.LZMAError)
CHUNK_BYTES = 2**20
OTHER_COMPRESSIONS = (".zst", ".tar", ".tgz", ".7z")  # of tables; see DECOMPRESSORS
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


def read_npz(path: Path, names: Sequence[str]) -> list[np.ndarray]:
    """Read arrays of an `.npz` file, after a check of the sizes that it declares.

    Raises:
        UserError: The file or an array is missing, the file is damaged or a decompression bomb, or
            an array would have to be unpickled.
    """
    if not path.is_file():
        raise UserError(f"{str(path)!r} is not a file")
    try:
        _check_npz(path)
        with np.load(path, allow_pickle=False) as file:
            for name in names:
                check_name(path, "array", name, list(file))
            return [file[name] for name in names]
    except UserError:
        raise
    except NPZ_DAMAGE_ERRORS as error:
        raise UserError(f"{path} is damaged: {error}") from error
    except (ValueError, AttributeError, SyntaxError) as error:
        raise UserError(f"{path} is not an .npz file of plain arrays: {error}") from error


@contextmanager
def open_table(path: Path) -> Iterator[IO[bytes]]:
    """Open a table that may be compressed, after a check of how large it is.

    Raises:
        UserError: The file is damaged or a decompression bomb, or the compression is unknown.
    """
    suffix = path.suffix.lower()
    if suffix in OTHER_COMPRESSIONS:
        allowed = join_choices(DECOMPRESSORS)
        raise UserError(
            f"{path}: a table compressed as {suffix} cannot be read; allowed: {allowed}"
        )
    if suffix not in DECOMPRESSORS:
        with path.open("rb") as file:
            yield file
        return
    decompress = DECOMPRESSORS[suffix]
    try:
        with decompress(path) as file:
            _check_stream_size(path, file)
        with decompress(path) as file:
            yield file
    except STREAM_DAMAGE_ERRORS as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _check_stream_size(path: Path, file: IO[bytes]) -> None:
    """Read a compressed stream up to the largest size allowed, and keep nothing of it."""
    left = limit = _max_expanded_bytes(path)
    while chunk := file.read(CHUNK_BYTES):
        left -= len(chunk)
        if left < 0:
            size = path.stat().st_size
            raise UserError(f"{path}: its {size:,} bytes expand to more than {limit:,}; refused")


def _max_expanded_bytes(path: Path) -> int:
    return max(MAX_UNCHECKED_BYTES, MAX_COMPRESSION_RATIO * path.stat().st_size)


@contextmanager
def _open_single_member(path: Path) -> Iterator[IO[bytes]]:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if len(names) != 1:
            raise UserError(f"{path} contains {len(names)} files; allowed: a single table")
        with archive.open(names[0]) as file:
            yield file


DECOMPRESSORS: dict[str, Callable[[Path], AbstractContextManager[Any]]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zip": _open_single_member,
}


def check_name(path: object, kind: str, name: str, available: Sequence[str]) -> None:
    """Check that a file has an array or a column of that name.

    Raises:
        UserError: It does not; the message names those that it has.
    """
    if name not in available:
        raise UserError(
            f"{path}: no {kind} {name!r}; available: {join_choices(available)}"
            f"{did_you_mean(name, available)}"
        )


def _check_npz(path: Path) -> None:
    """Check the array sizes that the file declares, without reading the arrays."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        total = sum(member.file_size for member in members)
        if total > _max_expanded_bytes(path):
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
    size = math.prod(map(int, shape)) * dtype.itemsize
    if dtype.hasobject:
        raise ValueError(f"{member.filename!r} contains objects, which would have to be unpickled")
    if size > member.file_size or min(shape, default=0) < 0:
        problem = f"{member.filename!r} declares {size:,} bytes, but contains"
        raise UserError(f"{path}: {problem} {member.file_size:,}; refused")
