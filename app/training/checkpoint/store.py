"""Files of tensors and plain values: safetensors files whose header holds the values as JSON.

A tensor is stored under its path, such as `model.features.0.weight`. The metadata of the header
contains the format version, the kind, epoch and number of the checkpoint, everything that is not a
tensor as one JSON text, and a SHA-256 of all bytes of the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from app.runtime.errors import UserError
from app.runtime.fault_injection import maybe_crash
from app.runtime.small_files import parse_json
from app.training.checkpoint.header import (
    DIGEST_START,
    FORMAT_VERSION,
    NO_DIGEST,
    READ_ERRORS,
    CheckpointInfo,
    as_read_error,
    verify_checksum,
)

MAX_HEADER_BYTES = 100_000_000  # more is refused by the library
MAX_VALUES = 2**22  # values in the JSON text; each takes at most a few hundred bytes of memory
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
        UserError: The content contains an object of another type, whose key the message names, or
            is larger than what `read_store` reads.
    """
    encoder = _Encoder()
    text = json.dumps(encoder.encode(content, ""))
    tensors = sorted(encoder.tensors.items(), key=lambda item: -item[1].element_size())
    header = _make_header(info, text, dict(tensors))
    parse_json(text, "the state to save", MAX_VALUES)  # what is written must be readable
    if len(header) > MAX_HEADER_BYTES:
        raise UserError(f"the state to save has more than {MAX_HEADER_BYTES:,} bytes of values")
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
    summary |= {} if info.step is None else {"step": str(info.step)}
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
        flat = tensor.as_strided((tensor.numel(),), (1,))  # also if one element has a stride
        yield flat.view(torch.uint8).numpy().data


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
        name = key[1:].encode(errors="backslashreplace").decode()  # surrogates are not Unicode text
        while name in self.tensors or name == "__metadata__":
            name += "_"
        identity = (tensor.data_ptr(), tensor.dtype, tensor.shape) if tensor.numel() else name
        stored = self.names.setdefault(identity, name)  # type: ignore[arg-type]
        if stored == name:
            self.tensors[name] = tensor
        return stored


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
            tensors = _copy_tensors(opened)
        content = _decode(parse_json(text, f"{file}: content", MAX_VALUES), tensors)
    except UserError:
        raise
    except READ_ERRORS as error:
        raise as_read_error(file, error) from error
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


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return all tensors of any safetensors file, on the CPU.

    Raises:
        UserError: The file is missing or damaged.
    """
    try:
        with safe_open(file, "pt") as opened:
            return _copy_tensors(opened)
    except READ_ERRORS as error:
        raise as_read_error(file, error) from error


def _copy_tensors(opened: Any) -> dict[str, Tensor]:
    return {name: _copy_tensor(opened, name) for name in opened.keys()}  # noqa: SIM118


def _copy_tensor(opened: Any, name: str) -> Tensor:
    """Return a tensor of the file that does not depend on it; the file is mapped into memory."""
    tensor: Tensor = opened.get_tensor(name)
    if tensor.dtype == torch.bool and (tensor.view(torch.uint8) > 1).any():
        raise ValueError(f"{name} contains values other than 0 and 1")
    return tensor.clone()
