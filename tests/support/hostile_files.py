"""Files that a checkpoint's reader must survive, byte by byte."""

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

WHOLE: dict[str, Any] = {
    "weights": torch.arange(12.0).reshape(3, 4),
    "turned": torch.arange(6).reshape(2, 3).t(),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "flags": torch.tensor([True, False]),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "none": torch.zeros(0, 7),
    "one": torch.tensor(3.5),
    "more": {"lr": [0.1, -1e300], "steps": 10**18, "rng": (3, (2**32 - 1, 7), None), 5: "é\n"},
}


def same(one: Any, other: Any) -> bool:
    """Whether both are equal to the last bit, in form and types, too."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        alike = (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        return alike and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other) or (math.isnan(one) and math.isnan(other))


def saved(value: Any) -> bytes:
    """As `torch.save` writes it."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def sealed(value: Any) -> bytes:
    """As this program writes it; whoever wants to can make a checksum."""
    file = io.BytesIO()
    write_with_checksum(
        file, "", CheckpointInfo("state", 1, 1), lambda inner: torch.save(value, inner)
    )
    return file.getvalue()


def archive(pickled: bytes, how: int = zipfile.ZIP_STORED, **records: bytes) -> bytes:
    """A file as `torch.save` writes it, around any pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as written:
        written.writestr("a/data.pkl", pickled)
        for key, content in records.items():
            written.writestr(f"a/data/{key}", content)
    return file.getvalue()


def named(name: str) -> bytes:
    """The opcode GLOBAL."""
    return (
        b"c" + name.rpartition(".")[0].encode() + b"\n" + name.rpartition(".")[2].encode() + b"\n"
    )


def text(value: str) -> bytes:
    """The opcode BINUNICODE."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    """The opcode LONG1."""
    content = pickle.encode_long(value)
    return b"\x8a" + bytes([len(content)]) + content


def whole(inner: bytes) -> bytes:
    """A pickle with all that it begins and ends with."""
    return b"\x80\x02" + inner + b"."


def claimed(count: int, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    """The pickle of a float32 tensor in the storage 0, whatever that has."""

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = text("storage") + named("torch.FloatStorage") + text("0") + text("cpu")
    hooks = named("collections.OrderedDict") + b")R"
    view = number(offset) + numbers(size) + numbers(stride) + b"\x89" + hooks
    whole_storage = b"(" + storage + number(count) + b"tQ"
    return whole(named("torch._utils._rebuild_tensor_v2") + b"(" + whole_storage + view + b"tR")


def doubled(times: int) -> bytes:
    """Lists of two, both of which are the list before: short to write, endless to walk through."""
    lists = [b"]q\x00"]
    for index in range(times):
        lists.append(b"]q" + bytes([index + 1]) + (b"h" + bytes([index]) + b"a") * 2)
    return b"(" + b"".join(lists) + b"t"


SHELL = "touch was_here"
CODE = {
    "os.system": named("os.system") + text(SHELL) + b"\x85R",
    "posix.system": text("posix") + text("system") + b"\x93" + text(SHELL) + b"\x85R",
    "builtins.eval": b"]" + named("builtins.eval") + text("open('was_here', 'w')") + b"\x85Ra",
    "torch.load": named("torch.load") + text("was_here") + b"\x85R",
    "torch.serialization.load": named("torch.serialization.load") + text("was_here") + b"\x85R",
    "os.popen": b"(" + text(SHELL) + b"ios\npopen\n",
    "builtins.bytearray": named("builtins.bytearray") + number(10**10) + b"\x85R",
    "torch.Tensor": named("torch.Tensor") + number(10**10) + b"\x85R",
    "torch.nn.modules.linear.Linear": named("torch.nn.modules.linear.Linear") + b")\x81",
    "_codecs.encode": named("_codecs.encode") + text("a") + text("latin1") + b"\x86R",
}
BOMBS = {
    "memo number 4294967295": archive(whole(b"Nr\xff\xff\xff\xff")),
    "claims 2500000000 elements": archive(claimed(25 * 10**8, (4,), (1,)), **{"0": bytes(64)}),
    "its storage has 16 elements": archive(
        claimed(16, (50_000, 50_000), (0, 0)), **{"0": bytes(64)}
    ),
    "size, stride or offset that no tensor has": archive(
        claimed(16, (2**62, 0), (1, 1)), **{"0": bytes(64)}
    ),
    "is compressed": archive(
        claimed(2**25, (4,), (1,)), zipfile.ZIP_DEFLATED, **{"0": bytes(2**27)}
    ),
    "refer to one another": archive(whole(doubled(60))),
    "a key of type tuple": archive(whole(b"}" + b")" + b"\x85" * 5 + b"Ns")),
    "nested more than": archive(whole(b"]" * 100_000 + b"a" * 99_999)),
    "an integer of more than": archive(whole(b"\x8a\xff" + b"\x7f" * 255)),
    "expected 2147483647 bytes": archive(b"\x80\x02X\xff\xff\xff\x7fabc."),
}


class Evil:
    """A pickle that runs a shell command when it is loaded without care."""

    def __reduce__(self) -> Any:
        return (os.system, (SHELL,))


def flip_bit(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
