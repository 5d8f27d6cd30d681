"""Write and verify the checksum of a checkpoint, and a short summary of what it contains.

Both are stored as JSON in the comment at the end of the zip file that `torch.save` writes. The zip
format allows such a comment, so torch reads the file like any other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast

from app.runtime.errors import UserError
from app.runtime.fault_injection import maybe_crash

END_RECORD = b"PK\x05\x06"  # starts the record at the end of a zip file
END_RECORD_LENGTH = 22  # bytes, without the comment that follows
BLOCK_SIZE = 1 << 20  # bytes read at once


@dataclass(frozen=True)
class CheckpointInfo:
    """Summary of a checkpoint.

    Attributes:
        kind: `state` is a training checkpoint to resume from, `weights` has weights only.
        epoch: Last epoch trained on.
        number: Sequence number of a training checkpoint within its run.
    """

    kind: Literal["state", "weights"]
    epoch: int
    number: int = 0


class HashingFile:
    """Binary file that hashes everything written to it.

    Args:
        file: Empty file, open for writing.
        name: Final name of the file, for fault injection.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.file, self.name, self.digest = file, name, hashlib.sha256()
        self.error: OSError | None = None  # torch replaces it with a RuntimeError

    def write(self, data: bytes) -> int:
        view = memoryview(data).cast("B")
        try:
            self.file.write(view[: len(view) // 2])
            maybe_crash("mid_write", self.name)
            self.file.write(view[len(view) // 2 :])
        except OSError as error:
            self.error = error
            raise
        self.digest.update(view)
        return len(view)

    def flush(self) -> None:
        self.file.flush()


def write_with_checksum(
    file: BinaryIO, name: str, info: CheckpointInfo, write: Callable[[BinaryIO], object]
) -> None:
    """Write a zip file with a checksum.

    Args:
        file: Empty file, open for writing.
        name: Final name of the file, for fault injection.
        info: Summary to store beside the checksum.
        write: Writes the zip file to the file it is given.
    """
    hashing = write_archive(file, name, write)
    comment = _make_comment(info, hashing.digest)
    file.seek(-2, 2)  # the last two bytes are the length of the comment, still 0
    file.write(len(comment).to_bytes(2, "little") + comment)


def write_archive(file: BinaryIO, name: str, write: Callable[[BinaryIO], object]) -> HashingFile:
    """Write a zip file without a checksum.

    Raises:
        OSError: The file cannot be written; torch itself would raise a less helpful RuntimeError.
    """
    hashing = HashingFile(file, name)
    try:
        write(cast(BinaryIO, hashing))
    except RuntimeError:
        if hashing.error is not None:
            raise hashing.error from None
        raise
    return hashing


def read_info(file: Path) -> CheckpointInfo:
    """Read the summary of a checkpoint without verifying its checksum.

    Raises:
        UserError: The summary is missing or damaged.
    """
    return _read_comment(file)[0]


def verify_checksum(file: Path) -> CheckpointInfo:
    """Verify the checksum of a checkpoint and return its summary.

    Raises:
        UserError: The file is missing or damaged.
    """
    info, comment = _read_comment(file)
    digest, left = hashlib.sha256(), file.stat().st_size - len(comment) - 2
    with file.open("rb") as opened:
        while left and (data := opened.read(min(left, BLOCK_SIZE))):
            digest.update(data)
            left -= len(data)
    digest.update(bytes(2))
    if comment != _make_comment(info, digest):
        raise UserError(f"{file} is damaged: its checksum does not match")
    return info


def _make_comment(info: CheckpointInfo, digest: hashlib._Hash) -> bytes:
    plain = json.dumps(asdict(info))
    digest.update(plain.encode())
    return json.dumps({**asdict(info), "sha256": digest.hexdigest()}).encode()


def _read_comment(file: Path) -> tuple[CheckpointInfo, bytes]:
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            opened.seek(max(0, size - END_RECORD_LENGTH - 1000))
            tail = opened.read()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    start = tail.rfind(END_RECORD)
    comment = tail[start + END_RECORD_LENGTH :]
    length = int.from_bytes(
        tail[start + END_RECORD_LENGTH - 2 : start + END_RECORD_LENGTH], "little"
    )
    if start < 0 or length != len(comment):
        raise UserError(f"{file} is truncated or not a checkpoint")
    if not comment:
        raise UserError(
            f"{file} has no checksum: it is damaged, or was not written by this program"
        )
    try:
        content = json.loads(comment)
        kind, epoch, number = (content[name] for name in ("kind", "epoch", "number"))
        is_valid = (
            kind in ("state", "weights") and isinstance(epoch, int) and isinstance(number, int)
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file} is damaged: its summary cannot be read") from error
    if not is_valid:
        raise UserError(f"{file} is damaged: its summary cannot be read")
    return CheckpointInfo(kind, epoch, number), comment
