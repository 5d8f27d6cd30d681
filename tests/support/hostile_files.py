"""Malicious and damaged checkpoint files, built byte by byte."""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.training.checkpoint.checksum import CheckpointInfo, write_with_checksum

SAMPLE_VALUE: dict[str, Any] = {
    "weights": torch.arange(12.0).reshape(3, 4),
    "turned": torch.arange(6).reshape(2, 3).t(),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "flags": torch.tensor([True, False]),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "none": torch.zeros(0, 7),
    "one": torch.tensor(3.5),
    "more": {"lr": [0.1, -1e300], "steps": 10**18, "rng": (3, (2**32 - 1, 7), None), 5: "é\n"},
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


def torch_save_bytes(value: Any) -> bytes:
    """Return the bytes that `torch.save` writes for a value."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def checkpoint_bytes(value: Any) -> bytes:
    """Return a file as this program writes it; its checksum is right whatever the value."""
    file = io.BytesIO()
    write_with_checksum(
        file, "", CheckpointInfo("state", 1, 1), lambda inner: torch.save(value, inner)
    )
    return file.getvalue()


def make_archive(pickled: bytes, compression: int = zipfile.ZIP_STORED, **records: bytes) -> bytes:
    """Return a file like those of `torch.save` around any pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as zip_file:
        zip_file.writestr("a/data.pkl", pickled)
        for key, content in records.items():
            zip_file.writestr(f"a/data/{key}", content)
    return file.getvalue()


def global_opcode(name: str) -> bytes:
    """Return the opcode GLOBAL."""
    return (
        b"c" + name.rpartition(".")[0].encode() + b"\n" + name.rpartition(".")[2].encode() + b"\n"
    )


def unicode_opcode(value: str) -> bytes:
    """Return the opcode BINUNICODE."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def long_opcode(value: int) -> bytes:
    """Return the opcode LONG1."""
    content = pickle.encode_long(value)
    return b"\x8a" + bytes([len(content)]) + content


def make_pickle(inner: bytes) -> bytes:
    """Add the first and last opcodes of a pickle."""
    return b"\x80\x02" + inner + b"."


def tensor_pickle(
    count: int, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0
) -> bytes:
    """Return a pickle that declares a float32 tensor in storage 0, which may not fit."""

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(long_opcode, values)) + b"t"

    storage = (
        unicode_opcode("storage")
        + global_opcode("torch.FloatStorage")
        + unicode_opcode("0")
        + unicode_opcode("cpu")
    )
    hooks = global_opcode("collections.OrderedDict") + b")R"
    view = long_opcode(offset) + numbers(size) + numbers(stride) + b"\x89" + hooks
    whole_storage = b"(" + storage + long_opcode(count) + b"tQ"
    return make_pickle(
        global_opcode("torch._utils._rebuild_tensor_v2") + b"(" + whole_storage + view + b"tR"
    )


def doubling_lists(times: int) -> bytes:
    """Return lists that contain the list before twice: short to write, endless to traverse."""
    lists = [b"]q\x00"]
    for index in range(times):
        lists.append(b"]q" + bytes([index + 1]) + (b"h" + bytes([index]) + b"a") * 2)
    return b"(" + b"".join(lists) + b"t"


SHELL_COMMAND = "touch was_here"
CODE_PICKLES = {
    "os.system": global_opcode("os.system") + unicode_opcode(SHELL_COMMAND) + b"\x85R",
    "posix.system": unicode_opcode("posix")
    + unicode_opcode("system")
    + b"\x93"
    + unicode_opcode(SHELL_COMMAND)
    + b"\x85R",
    "builtins.eval": b"]"
    + global_opcode("builtins.eval")
    + unicode_opcode("open('was_here', 'w')")
    + b"\x85Ra",
    "torch.load": global_opcode("torch.load") + unicode_opcode("was_here") + b"\x85R",
    "torch.serialization.load": global_opcode("torch.serialization.load")
    + unicode_opcode("was_here")
    + b"\x85R",
    "os.popen": b"(" + unicode_opcode(SHELL_COMMAND) + b"ios\npopen\n",
    "builtins.bytearray": global_opcode("builtins.bytearray") + long_opcode(10**10) + b"\x85R",
    "torch.Tensor": global_opcode("torch.Tensor") + long_opcode(10**10) + b"\x85R",
    "torch.nn.modules.linear.Linear": global_opcode("torch.nn.modules.linear.Linear") + b")\x81",
    "_codecs.encode": global_opcode("_codecs.encode")
    + unicode_opcode("a")
    + unicode_opcode("latin1")
    + b"\x86R",
}
MEMORY_BOMBS = {
    "memo number 4294967295": make_archive(make_pickle(b"Nr\xff\xff\xff\xff")),
    "claims 2500000000 elements": make_archive(
        tensor_pickle(25 * 10**8, (4,), (1,)), **{"0": bytes(64)}
    ),
    "its storage has 16 elements": make_archive(
        tensor_pickle(16, (50_000, 50_000), (0, 0)), **{"0": bytes(64)}
    ),
    "impossible size, stride or offset": make_archive(
        tensor_pickle(16, (2**62, 0), (1, 1)), **{"0": bytes(64)}
    ),
    "is compressed": make_archive(
        tensor_pickle(2**25, (4,), (1,)), zipfile.ZIP_DEFLATED, **{"0": bytes(2**27)}
    ),
    "refer to one another": make_archive(make_pickle(doubling_lists(60))),
    "a key of type tuple": make_archive(make_pickle(b"}" + b")" + b"\x85" * 5 + b"Ns")),
    "nested more than": make_archive(make_pickle(b"]" * 100_000 + b"a" * 99_999)),
    "an integer of more than": make_archive(make_pickle(b"\x8a\xff" + b"\x7f" * 255)),
    "expected 2147483647 bytes": make_archive(b"\x80\x02X\xff\xff\xff\x7fabc."),
}


class MaliciousPickle:
    """An object whose pickle runs a shell command when it is loaded."""

    def __reduce__(self) -> Any:
        return (os.system, (SHELL_COMMAND,))


def flip_bit(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
