"""Pickles of tensors and plain values, read without pickle: there is nothing in here that calls."""

from __future__ import annotations

import io
import pickletools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from app.config.limits import DEPTH
from app.training.checkpoint.tensor_reader import (
    DTYPES,
    STORAGES,
    ForbiddenContentError,
    Storage,
    shorten,
    make_tensor,
)

MAX_OPCODES = 2**22  # in one pickle; each makes at most some hundred bytes
MAX_VALUES_PER_OPCODE = 10  # times as many values as opcodes, where values refer to others again and again
MAX_INTEGER_BYTES = 9  # bytes of an integer, which is 64 bits with or without a sign
ORDERED = "collections.OrderedDict"  # of a tensor's hooks, always empty
TENSOR, TENSOR_OF_DTYPE = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"
GLOBALS = {ORDERED, TENSOR, TENSOR_OF_DTYPE, *STORAGES, *DTYPES}
LEAVES = (str, int, float, bool, type(None), Tensor)
Record = Callable[[str], Tensor]  # the bytes of a storage, by its key


@dataclass(frozen=True)
class _Global:
    name: str


def read_pickle(content: bytes, record: Record) -> Any:
    """The value of a pickle that `torch.save` made.

    Args:
        content: Of its `data.pkl`.
        record: Gives the bytes of a storage, uint8 of shape (N,); a `KeyError` where it has none.

    Raises:
        RefusedError: It asks for anything but tensors and plain values.
        ValueError: It is damaged.
    """
    reader = _Reader(record)
    for count, (opcode, argument, _) in enumerate(pickletools.genops(io.BytesIO(content)), 1):
        if count > MAX_OPCODES:
            raise ForbiddenContentError(f"more than {MAX_OPCODES:,} opcodes")
        step = STEPS.get(opcode.name)
        if step is None:
            raise ForbiddenContentError(reader.told(opcode.name, argument))
        try:
            step(reader, argument)
        except (IndexError, KeyError) as error:
            raise ValueError(f"{opcode.name} has nothing to work on: {error}") from error
    (value,) = reader.stack
    _check_plain(value, MAX_VALUES_PER_OPCODE * count)
    return value


def _check_plain(value: Any, most: int) -> None:
    """No stand-in is left over, and whoever walks through it comes to an end."""
    left, count = [(value, 1)], 0
    while left:
        value, depth = left.pop()
        count += 1
        if depth > DEPTH:
            raise ForbiddenContentError(f"values nested more than {DEPTH} deep")
        if count > most:
            raise ForbiddenContentError("values that refer to one another over and over")
        if type(value) in (list, tuple):
            left += [(part, depth + 1) for part in value]
        elif type(value) in (dict, OrderedDict):
            left += [(part, depth + 1) for part in value.values()]
        elif type(value) not in LEAVES:
            raise ForbiddenContentError(value.name if isinstance(value, _Global) else "a bare storage")


class _Reader:
    """A stack and a memo, as pickle has them."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []

    def told(self, opcode: str, argument: Any) -> str:
        """What an opcode that is not allowed would do, for errors."""
        if opcode == "INST":
            return shorten(str(argument).replace(" ", "."))
        names = [part for part in self.stack[-2:] if isinstance(part, str)]
        if opcode == "STACK_GLOBAL" and names:
            return shorten(".".join(names))
        return f"the opcode {opcode}"

    def go_on(self, _: Any) -> None:
        """Nothing to do."""

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self, _: None) -> None:
        self.marks.append(len(self.stack))

    def since_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise ValueError(f"a tuple of {count} of {len(self.stack)}")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def put(self, index: int) -> None:
        """Numbers come in order; others would ask for room that nothing fills."""
        if index != len(self.memo):
            raise ValueError(f"memo number {index} after {len(self.memo)}")
        self.memo.append(self.stack[-1])

    def get(self, index: int) -> None:
        self.push(self.memo[index])

    def integer(self, value: int) -> None:
        if value.bit_length() > 8 * MAX_INTEGER_BYTES:
            raise ForbiddenContentError(f"an integer of more than {MAX_INTEGER_BYTES} bytes")
        self.push(value)

    def named(self, argument: str) -> None:
        name = argument.replace(" ", ".")
        if name not in GLOBALS:
            raise ForbiddenContentError(shorten(name))
        self.push(_Global(name))

    def append(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError("items for what is no list")
        self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        target, keys, values = self.stack[-1], items[::2], items[1::2]
        if type(target) is not dict:
            raise ValueError("keys for what is no dict")
        # The hash of a nested tuple can take forever.
        wrong = [type(key).__name__ for key in keys if type(key) not in (str, int)]
        if wrong:
            raise ForbiddenContentError(f"a key of type {wrong[0]}")
        target.update(zip(keys, values, strict=True))

    def storage(self, _: None) -> None:
        match self.stack.pop():
            case ("storage", _Global(name), str(key), str(), int(count)) if name in STORAGES:
                dtype, record = STORAGES[name], self.record(key)
                if not 0 <= count * dtype.itemsize <= len(record):
                    has = f"has {len(record)} bytes"
                    raise ValueError(f"storage {shorten(key)} claims {count} elements and {has}")
                if dtype == torch.bool and (record > 1).any():
                    raise ValueError(f"storage {shorten(key)} holds more than false and true")
                self.push(Storage(record, dtype, count))
            case _:
                raise ForbiddenContentError("a persistent id that is no storage")

    def call(self, _: None) -> None:
        """The three calls that there are, done here."""
        arguments, function = self.stack.pop(), self.stack.pop()
        match function, arguments:
            case _Global(name), () if name == ORDERED:
                self.push(OrderedDict())
            case _Global(name), (Storage(), _, _, _, _, _) if name == TENSOR:
                self.push(make_tensor(arguments[0].dtype, *arguments))
            case _Global(name), (Storage(), _, _, _, _, _, _Global(dtype)) if (
                name == TENSOR_OF_DTYPE and dtype in DTYPES
            ):
                self.push(make_tensor(DTYPES[dtype], *arguments[:-1]))
            case _:
                name = function.name if isinstance(function, _Global) else "a value"
                raise ForbiddenContentError(f"a call of {name} with unknown arguments")


STEPS: dict[str, Callable[[_Reader, Any], None]] = {
    "PROTO": _Reader.go_on,
    "STOP": _Reader.go_on,
    "MARK": _Reader.mark,
    "NONE": lambda reader, _: reader.push(None),
    "NEWTRUE": lambda reader, _: reader.push(True),
    "NEWFALSE": lambda reader, _: reader.push(False),
    "BININT": _Reader.push,
    "BININT1": _Reader.push,
    "BININT2": _Reader.push,
    "LONG1": _Reader.integer,
    "BINFLOAT": _Reader.push,
    "BINUNICODE": _Reader.push,
    "EMPTY_TUPLE": lambda reader, _: reader.push(()),
    "EMPTY_LIST": lambda reader, _: reader.push([]),
    "EMPTY_DICT": lambda reader, _: reader.push({}),
    "TUPLE": lambda reader, _: reader.push(tuple(reader.since_mark())),
    "TUPLE1": lambda reader, _: reader.tuple_of(1),
    "TUPLE2": lambda reader, _: reader.tuple_of(2),
    "TUPLE3": lambda reader, _: reader.tuple_of(3),
    "APPEND": lambda reader, _: reader.append([reader.stack.pop()]),
    "APPENDS": lambda reader, _: reader.append(reader.since_mark()),
    "SETITEM": lambda reader, _: reader.set_items([reader.stack.pop(-2), reader.stack.pop()]),
    "SETITEMS": lambda reader, _: reader.set_items(reader.since_mark()),
    "BINPUT": _Reader.put,
    "LONG_BINPUT": _Reader.put,
    "BINGET": _Reader.get,
    "LONG_BINGET": _Reader.get,
    "GLOBAL": _Reader.named,
    "BINPERSID": _Reader.storage,
    "REDUCE": _Reader.call,
}
