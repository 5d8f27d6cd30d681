"""Malicious and damaged checkpoint files, built byte by byte."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.training.checkpoint.header import DIGEST_START, FORMAT_VERSION, NO_DIGEST, CheckpointInfo
from app.training.checkpoint.store import write_store

SAMPLE_VALUE: dict[str, Any] = {
    "weights": torch.arange(12.0).reshape(3, 4),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "flags": torch.tensor([True, False]),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "none": torch.zeros(0, 7),
    "one": torch.tensor(3.5),
    "complex": torch.tensor([1 + 2j, math.inf], dtype=torch.complex128),
    "more": {"lr": [0.1, -1e300], "steps": 10**18, "rng": (3, (2**32 - 1, 7), None), 5: "é\n"},
    "marks": {"$tensor": "weights", "$tuple": []},
    "a.b": torch.zeros(1),
    "a": {"b": torch.ones(1)},
}


def is_identical(one: Any, other: Any) -> bool:
    """Return whether two values are equal bit by bit, including their types and layouts."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        layouts = [(tensor.dtype, tensor.shape, tensor.stride()) for tensor in (one, other)]
        return layouts[0] == layouts[1] and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(is_identical(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(is_identical, one, other))
    return bool(one == other) or (math.isnan(one) and math.isnan(other))


def checkpoint_bytes(value: Any) -> bytes:
    """Return a file as this program writes it; its checksum is right whatever the value."""
    file = io.BytesIO()
    write_store(file, "", CheckpointInfo("state", 1, 1), value)
    return file.getvalue()


def make_store(text: str, tensors: str = "", data: bytes = b"", **metadata: Any) -> bytes:
    """Return a file with any content and a right checksum.

    Args:
        text: JSON text of the content.
        tensors: Entries of the header, as JSON without the outer brackets.
        data: Bytes of the tensors.
        metadata: Entries of the metadata that replace the usual ones; None removes one.
    """
    usual = {"format": FORMAT_VERSION, "kind": "state", "epoch": "1", "number": "1"}
    entries = {"sha256": NO_DIGEST, **usual, "content": text} | metadata
    kept = {name: value for name, value in entries.items() if value is not None}
    header = json.dumps({"__metadata__": kept}, separators=(",", ":"))
    return with_checksum(make_safetensors(f"{header[:-1]}{',' * bool(tensors)}{tensors}}}", data))


def make_safetensors(header: str, data: bytes = b"") -> bytes:
    """Return a safetensors file with any header."""
    return struct.pack("<Q", len(header.encode())) + header.encode() + data


def with_checksum(content: bytes) -> bytes:
    """Return a file with the checksum that belongs to its other bytes."""
    start, end = content[:DIGEST_START], content[DIGEST_START + len(NO_DIGEST) :]
    digest = hashlib.sha256(start + NO_DIGEST.encode() + end).hexdigest()
    return start + digest.encode() + end


SHELL_COMMAND = "touch was_here"


class MaliciousPickle:
    """An object whose pickle runs a shell command when it is loaded."""

    def __reduce__(self) -> Any:
        return (os.system, (SHELL_COMMAND,))


def flip_bit(path: Path) -> None:
    """Flip one bit of the last tensor in a file."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
