"""Files of tensors and plain values: safetensors files whose header holds the values as JSON.

A tensor is stored under its path, such as `model.features.0.weight`. The metadata of the header
contains the format version, the kind, epoch and number of the checkpoint, everything that is not a
tensor as one JSON text, and a SHA-256 of all bytes of the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from app.config.limits import load_json
from app.runtime.errors import UserError
from app.runtime.fault_injection import maybe_crash

FORMAT_VERSION = "4"
BLOCK_SIZE = 1 << 20  # bytes read at once
MAX_VALUES = 2**22  # values in the JSON text; each takes at most a few hundred bytes of memory
MAX_MESSAGE = 150  # characters of the reader's message that are shown
NO_DIGEST = "0" * 64  # stands in the header while the digest is computed
HEADER_START = b'{"__metadata__":{"sha256":"'
DIGEST_START = 8 + len(HEADER_START)  # the file starts with the length of the header
READ_ERRORS = (SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError)
SCALARS = (str, int, float, bool, type(None))
TENSOR, COMPLEX, TUPLE, ITEMS = "$tensor", "$complex", "$tuple", "$items"  # mark encoded values
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class CheckpointInfo:
    """Summary of a checkpoint, readable without its content.

    Attributes:
        kind: `state` is a training checkpoint to resume from, `weights` has weights only.
        epoch: Last epoch trained on, counted from 1.
        number: Sequence number of a training checkpoint within its run.
    """

    kind: Literal["state", "weights"]
    epoch: int
    number: int = 0


def write_store(file: BinaryIO, name: str, info: CheckpointInfo, content: dict[str, Any]) -> None:
    """Write tensors and plain values to an open file.

    A tensor that occurs several times, such as a tied weight, is stored once.

    Args:
        file: Empty file.
        name: Final name of the file, for fault injection.
        info: Summary of the content.
        content: Contiguous tensors on the CPU and plain values, in lists, tuples and dicts with
            string or integer keys.

    Raises:
        UserError: The content contains an object of another type; the message names its key.
    """
    encoder = _Encoder()
    text = json.dumps(encoder.encode(content, ""))
    tensors = sorted(encoder.tensors.items(), key=lambda item: -item[1].element_size())
    header = _make_header(info, text, dict(tensors))
    digest = hashlib.sha256()
    for part in _parts(header, tensors):
        digest.update(part)
        file.write(part)
        maybe_crash("mid_write", name)
    file.seek(DIGEST_START)
    file.write(digest.hexdigest().encode())
    file.seek(0, 2)


def _make_header(info: CheckpointInfo, text: str, tensors: dict[str, Tensor]) -> bytes:
    summary = {"kind": info.kind, "epoch": str(info.epoch), "number": str(info.number)}
    metadata = {"sha256": NO_DIGEST, "format": FORMAT_VERSION, **summary, "content": text}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        shape = list(tensor.shape)
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    return encoded + b" " * (-len(encoded) % 8)  # aligns the tensors


def _parts(header: bytes, tensors: list[tuple[str, Tensor]]) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little")
    yield header
    for _, tensor in tensors:
        yield tensor.reshape(-1).view(torch.uint8).numpy().data


class _Encoder:
    """Turns values into JSON values, and collects their tensors by name."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.names: dict[tuple[Any, ...], str] = {}

    def encode(self, value: Any, key: str) -> Any:
        """Return the JSON value for the value at that key."""
        if isinstance(value, Tensor):
            return self.encode_tensor(value, key)
        if isinstance(value, dict):
            return self.encode_dict(value, key)
        if isinstance(value, (list, tuple)):
            parts = [self.encode(part, f"{key}.{index}") for index, part in enumerate(value)]
            return {TUPLE: parts} if isinstance(value, tuple) else parts
        if type(value) not in SCALARS:
            raise UserError(
                f"{key[1:]}: a {type(value).__name__} cannot be saved; allowed: tensors, numbers, "
                "strings, None, and lists, tuples and dicts of them"
            )
        return value

    def encode_dict(self, value: dict[Any, Any], key: str) -> Any:
        for name in value:
            if type(name) not in (str, int):
                raise UserError(f"{key[1:]}: the key {name!r} cannot be saved; allowed: str, int")
        encoded = {name: self.encode(part, f"{key}.{name}") for name, part in value.items()}
        if all(isinstance(name, str) and not name.startswith("$") for name in value):
            return encoded
        return {ITEMS: list(encoded.items())}

    def encode_tensor(self, tensor: Tensor, key: str) -> dict[str, str]:
        if tensor.is_complex():
            return {COMPLEX: self.add(torch.view_as_real(tensor.resolve_conj()), key)}
        return {TENSOR: self.add(tensor, key)}

    def add(self, tensor: Tensor, key: str) -> str:
        """Return the name under which the tensor is stored."""
        if tensor.dtype not in DTYPES:
            raise UserError(f"{key[1:]}: a tensor of dtype {tensor.dtype} cannot be saved")
        name = key[1:]
        while name in self.tensors or name == "__metadata__":
            name += "_"
        identity = (tensor.data_ptr(), tensor.dtype, tensor.shape) if tensor.numel() else name
        stored = self.names.setdefault(identity, name)  # type: ignore[arg-type]
        if stored == name:
            self.tensors[name] = tensor
        return stored


def read_info(file: Path) -> CheckpointInfo:
    """Read the summary of a checkpoint without verifying its checksum.

    Raises:
        UserError: The file is missing, damaged, or not a checkpoint of this program.
    """
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
    except READ_ERRORS as error:
        raise _read_error(file, error) from error
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
        raise _read_error(file, error) from error
    if start[8:] != HEADER_START or saved != digest.hexdigest().encode():
        raise UserError(f"{file} is damaged: its checksum does not match")
    return info


def read_store(file: Path) -> tuple[CheckpointInfo, dict[str, Any]]:
    """Read what `write_store` wrote, with tensors on the CPU.

    Nothing in the file is executed, and no tensor is larger than its part of the file.

    Raises:
        UserError: The file is missing, damaged, or was not written by this program.
    """
    info = verify_checksum(file)
    try:
        with safe_open(file, "pt") as opened:
            text = opened.metadata()["content"]
            tensors = {name: _copy_tensor(opened, name) for name in opened.keys()}  # noqa: SIM118
        if sum(map(text.count, ",[{")) > MAX_VALUES:
            raise UserError(f"{file} contains more than {MAX_VALUES:,} values")
        content = _decode(load_json(text, f"{file}: content"), tensors)
    except UserError:
        raise
    except READ_ERRORS as error:
        raise _read_error(file, error) from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a checkpoint of this program")
    return info, content


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    match next(iter(value.items()), None):
        case (str(mark), inner) if mark == TENSOR:
            return tensors[inner]
        case (str(mark), inner) if mark == COMPLEX:
            return torch.view_as_complex(tensors[inner])
        case (str(mark), inner) if mark == TUPLE:
            return tuple(_decode(inner, tensors))
        case (str(mark), inner) if mark == ITEMS:
            return {name: _decode(part, tensors) for name, part in inner}
    return {name: _decode(part, tensors) for name, part in value.items()}


def _copy_tensor(opened: Any, name: str) -> Tensor:
    """Return a tensor of the file that does not depend on it; the file is mapped into memory."""
    tensor: Tensor = opened.get_tensor(name)
    if tensor.dtype == torch.bool and (tensor.view(torch.uint8) > 1).any():
        raise ValueError(f"{name} contains values other than 0 and 1")
    return tensor.clone()


def _parse_info(file: Path, metadata: dict[str, str]) -> CheckpointInfo:
    if "format" not in metadata or "content" not in metadata:
        raise UserError(f"{file} is not a checkpoint of this program")
    if metadata["format"] != FORMAT_VERSION:
        raise UserError(
            f"{file} has format {printable(metadata['format'])}; this program reads format "
            f"{FORMAT_VERSION}"
        )
    kind, epoch, number = (metadata.get(name, "") for name in ("kind", "epoch", "number"))
    is_number = all(text.isdecimal() and len(text) < 20 for text in (epoch, number))
    if kind not in ("state", "weights") or not is_number:
        raise UserError(f"{file} is damaged: its summary cannot be read")
    return CheckpointInfo(kind, int(epoch), int(number))  # type: ignore[arg-type]


def _read_error(file: Path, error: Exception) -> UserError:
    reason = printable(str(error)) or type(error).__name__
    if isinstance(error, SafetensorError):
        return UserError(f"{file} is truncated or not a checkpoint: {reason}")
    if isinstance(error, OSError):
        return UserError(f"{file} cannot be read: {error.strerror or reason}")
    return UserError(f"{file} is damaged: {reason}")


def printable(text: str) -> str:
    """Return printable text of limited length."""
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE - 3]}..."
