"""Header of a checkpoint file: what kind it is, and whether the file is complete.

This module does not import torch, because the command line looks for checkpoints before it starts.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open

from app.runtime.errors import UserError

FORMAT_VERSION = "4"
BLOCK_SIZE = 1 << 20  # bytes read at once
MAX_MESSAGE = 150  # characters of the reader's message that are shown
NO_DIGEST = "0" * 64  # stands in the header while the digest is computed
HEADER_START = b'{"__metadata__":{"sha256":"'
DIGEST_START = 8 + len(HEADER_START)  # the file starts with the length of the header
READ_ERRORS = (SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError)


@dataclass(frozen=True)
class CheckpointInfo:
    """Summary of a checkpoint, readable without its content.

    Attributes:
        kind: `state` is a training checkpoint to resume from, `weights` has weights only.
        epoch: Last epoch trained on, counted from 1.
        number: Sequence number of a training checkpoint within its run.
        step: Number of optimizer steps of weights, if the run validates within epochs.
    """

    kind: Literal["state", "weights"]
    epoch: int
    number: int = 0
    step: int | None = None


def read_info(file: Path) -> CheckpointInfo:
    """Read the summary of a checkpoint without verifying its checksum.

    Raises:
        UserError: The file is missing, damaged, or not a checkpoint of this program.
    """
    try:
        with safe_open(file, "np") as opened:
            metadata = opened.metadata() or {}
    except READ_ERRORS as error:
        raise as_read_error(file, error) from error
    return _parse_info(file, metadata)


def verify_checksum(file: Path) -> CheckpointInfo:
    """Verify the checksum of a checkpoint and return its summary.

    Raises:
        UserError: The file is missing or damaged.
    """
    info, digest = read_info(file), hashlib.sha256()
    try:
        with file.open("rb") as opened:
            start, saved = opened.read(DIGEST_START), opened.read(len(NO_DIGEST))
            digest.update(start + NO_DIGEST.encode())
            while block := opened.read(BLOCK_SIZE):
                digest.update(block)
    except OSError as error:
        raise as_read_error(file, error) from error
    if start[8:] != HEADER_START or saved != digest.hexdigest().encode():
        raise UserError(f"{file} is damaged: its checksum does not match")
    return info


def _parse_info(file: Path, metadata: dict[str, str]) -> CheckpointInfo:
    if "format" not in metadata or "content" not in metadata:
        raise UserError(f"{file} is not a checkpoint of this program")
    if metadata["format"] != FORMAT_VERSION:
        raise UserError(
            f"{file} has format {_printable(metadata['format'])}; this program reads format "
            f"{FORMAT_VERSION}"
        )
    kind, *numbers = (metadata.get(name, "") for name in ("kind", "epoch", "number"))
    if "step" in metadata:
        numbers.append(metadata["step"])
    is_number = all(text.isdecimal() and len(text) < 20 for text in numbers)
    if kind not in ("state", "weights") or not is_number:
        raise UserError(f"{file} is damaged: its summary cannot be read")
    return CheckpointInfo(kind, *map(int, numbers))  # type: ignore[arg-type]


def as_read_error(file: Path, error: Exception) -> UserError:
    """Return an error of reading a file as an error for the user."""
    reason = _printable(str(error)) or type(error).__name__
    if isinstance(error, SafetensorError):
        return UserError(f"{file} is truncated or not a checkpoint: {reason}")
    if isinstance(error, OSError):
        return UserError(f"{file} cannot be read: {error.strerror or reason}")
    return UserError(f"{file} is damaged: {reason}")


def _printable(text: str) -> str:
    """Return printable text of limited length."""
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE - 3]}..."
