"""The last bytes of a checkpoint: what it is, and a checksum over all of it.

They stand in the comment at the end of the zip file that `torch.save` writes, which is a place for
them in the format: torch reads the file as it does any other.
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

END_RECORD = b"PK\x05\x06"  # the record at the end of a zip file, 22 bytes and the comment
END_RECORD_LENGTH = 22
BLOCK_SIZE = 1 << 20  # bytes that are read at once


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint is.

    Attributes:
        kind: A `state` to go on from, or `weights` alone.
        epoch: The last one whose learning is in it.
        number: Of the state, among those that a run has saved.
    """

    kind: Literal["state", "weights"]
    epoch: int
    number: int = 0


class HashingFile:
    """An open file in which everything counts that is written.

    Args:
        file: Empty.
        name: Of what it becomes.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.file, self.name, self.digest = file, name, hashlib.sha256()
        self.error: OSError | None = None  # torch puts one of its own in its place

    def write(self, data: bytes) -> int:
        """As that of a file."""
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
        """As that of a file."""
        self.file.flush()


def write_with_checksum(
    file: BinaryIO, name: str, seal: CheckpointInfo, write: Callable[[BinaryIO], object]
) -> None:
    """Writes a zip file and seals it.

    Args:
        file: Empty.
        name: Of what it becomes.
        seal: What it is.
        write: Given a file to write to.
    """
    sealed = write_archive(file, name, write)
    comment = _comment(seal, sealed.digest)
    file.seek(-2, 2)  # the length of the comment, until now none
    file.write(len(comment).to_bytes(2, "little") + comment)


def write_archive(file: BinaryIO, name: str, write: Callable[[BinaryIO], object]) -> HashingFile:
    """Writes a zip file by torch, without a seal.

    Raises:
        OSError: It cannot be written; torch itself would say where in the zip file it was.
    """
    sealed = HashingFile(file, name)
    try:
        write(cast(BinaryIO, sealed))
    except RuntimeError:
        if sealed.error is not None:
            raise sealed.error from None
        raise
    return sealed


def read_info(file: Path) -> CheckpointInfo:
    """What a checkpoint says it is; whether that is so only `check_seal` finds out.

    Raises:
        UserError: It has no seal.
    """
    return _read(file)[0]


def verify_checksum(file: Path) -> CheckpointInfo:
    """What a checkpoint is, once all of it has been found as it was written.

    Raises:
        UserError: It has not.
    """
    seal, comment = _read(file)
    digest, left = hashlib.sha256(), file.stat().st_size - len(comment) - 2
    with file.open("rb") as opened:
        while left and (data := opened.read(min(left, BLOCK_SIZE))):
            digest.update(data)
            left -= len(data)
    digest.update(bytes(2))
    if comment != _comment(seal, digest):
        raise UserError(f"{file} is damaged: it does not have its checksum")
    return seal


def _comment(seal: CheckpointInfo, digest: hashlib._Hash) -> bytes:
    plain = json.dumps(asdict(seal))
    digest.update(plain.encode())
    return json.dumps({**asdict(seal), "sha256": digest.hexdigest()}).encode()


def _read(file: Path) -> tuple[CheckpointInfo, bytes]:
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            opened.seek(max(0, size - END_RECORD_LENGTH - 1000))
            tail = opened.read()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    start = tail.rfind(END_RECORD)
    comment = tail[start + END_RECORD_LENGTH :]
    told = int.from_bytes(tail[start + END_RECORD_LENGTH - 2 : start + END_RECORD_LENGTH], "little")
    if start < 0 or told != len(comment):
        raise UserError(f"{file} is truncated or no checkpoint")
    if not comment:
        raise UserError(f"{file} has no checksum: it is damaged, or not of this program")
    try:
        content = json.loads(comment)
        kind, epoch, number = (content[name] for name in ("kind", "epoch", "number"))
        sound = kind in ("state", "weights") and isinstance(epoch, int) and isinstance(number, int)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file} is damaged: its last bytes are no seal") from error
    if not sound:
        raise UserError(f"{file} is damaged: its last bytes are no seal")
    return CheckpointInfo(kind, epoch, number), comment
