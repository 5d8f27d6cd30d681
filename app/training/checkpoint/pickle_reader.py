"""Read pickles of tensors and plain values without the pickle module, so that nothing is called."""

from __future__ import annotations

import io
import pickletools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from app.config.limits import MAX_NESTING
from app.training.checkpoint.tensor_reader import (
    DTYPES,
    STORAGES,
    ForbiddenContentError,
    Storage,
    make_tensor,
    printable,
)

MAX_OPCODES = 2**22  # in one pickle; each takes at most a few hundred bytes of memory
MAX_VALUES_PER_OPCODE = 10  # more only if values refer to one another again and again
MAX_INTEGER_BYTES = 9  # enough for 64 bits, signed or unsigned
ORDERED = "collections.OrderedDict"  # type of a tensor's hooks, always empty
TENSOR, TENSOR_OF_DTYPE = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"
GLOBALS = {ORDERED, TENSOR, TENSOR_OF_DTYPE, *STORAGES, *DTYPES}
LEAVES = (str, int, float, bool, type(None), Tensor)
StorageBytes = Callable[[str], Tensor]  # from the key of a storage to its bytes


@dataclass(frozen=True)
class _Global:
    name: str


def read_pickle(content: bytes, storage_bytes: StorageBytes) -> Any:
    """Return the value of a pickle written by `torch.save`.

    Args:
        content: Content of `data.pkl`.
        storage_bytes: Returns the bytes of a storage by its key, as uint8 of shape (N,); raises
            KeyError if there is no such storage.

    Raises:
        ForbiddenContentError: The pickle contains more than tensors and plain values.
        ValueError: The pickle is damaged.
    """
    reader = _Reader(storage_bytes)
    for count, (opcode, argument, _) in enumerate(pickletools.genops(io.BytesIO(content)), 1):
        if count > MAX_OPCODES:
            raise ForbiddenContentError(f"more than {MAX_OPCODES:,} opcodes")
        step = STEPS.get(opcode.name)
        if step is None:
            raise ForbiddenContentError(reader.describe(opcode.name, argument))
        try:
            step(reader, argument)
        except (IndexError, KeyError) as error:
            raise ValueError(f"{opcode.name} has nothing to work on: {error}") from error
    (value,) = reader.stack
    _check_plain(value, MAX_VALUES_PER_OPCODE * count)
    return value


def _check_plain(value: Any, max_count: int) -> None:
    """Check that only plain values are left, and few enough to traverse."""
    left, count = [(value, 1)], 0
    while left:
        value, depth = left.pop()
        count += 1
        if depth > MAX_NESTING:
            raise ForbiddenContentError(f"values nested more than {MAX_NESTING} deep")
        if count > max_count:
            raise ForbiddenContentError("values that refer to one another again and again")
        if type(value) in (list, tuple):
            left += [(part, depth + 1) for part in value]
        elif type(value) in (dict, OrderedDict):
            left += [(part, depth + 1) for part in value.values()]
        elif type(value) not in LEAVES:
            raise ForbiddenContentError(
                value.name if isinstance(value, _Global) else "a bare storage"
            )


class _Reader:
    """Pickle machine: a stack, its marks and a memo."""

    def __init__(self, storage_bytes: StorageBytes) -> None:
        self.storage_bytes = storage_bytes
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []

    def describe(self, opcode: str, argument: Any) -> str:
        """Describe what a forbidden opcode would do, for error messages."""
        if opcode == "INST":
            return printable(str(argument).replace(" ", "."))
        names = [part for part in self.stack[-2:] if isinstance(part, str)]
        if opcode == "STACK_GLOBAL" and names:
            return printable(".".join(names))
        return f"the opcode {opcode}"

    def ignore(self, _: Any) -> None:
        pass

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self, _: None) -> None:
        self.marks.append(len(self.stack))

    def pop_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def make_tuple(self, count: int) -> None:
        if len(self.stack) < count:
            raise ValueError(f"a tuple of {count} from a stack of {len(self.stack)}")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def put(self, index: int) -> None:
        """Memoize the top of the stack; indices are consecutive, so that the memo stays small."""
        if index != len(self.memo):
            raise ValueError(f"memo number {index} after {len(self.memo)}")
        self.memo.append(self.stack[-1])

    def get(self, index: int) -> None:
        self.push(self.memo[index])

    def push_integer(self, value: int) -> None:
        if value.bit_length() > 8 * MAX_INTEGER_BYTES:
            raise ForbiddenContentError(f"an integer of more than {MAX_INTEGER_BYTES} bytes")
        self.push(value)

    def push_global(self, argument: str) -> None:
        name = argument.replace(" ", ".")
        if name not in GLOBALS:
            raise ForbiddenContentError(printable(name))
        self.push(_Global(name))

    def append(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError("items for an object that is not a list")
        self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        target, keys, values = self.stack[-1], items[::2], items[1::2]
        if type(target) is not dict:
            raise ValueError("keys for an object that is not a dict")
        # Hashing a nested tuple can take forever.
        forbidden = [type(key).__name__ for key in keys if type(key) not in (str, int)]
        if forbidden:
            raise ForbiddenContentError(f"a key of type {forbidden[0]}")
        target.update(zip(keys, values, strict=True))

    def push_storage(self, _: None) -> None:
        match self.stack.pop():
            case ("storage", _Global(name), str(key), str(), int(count)) if name in STORAGES:
                dtype, content = STORAGES[name], self.storage_bytes(key)
                if not 0 <= count * dtype.itemsize <= len(content):
                    has = f"has {len(content)} bytes"
                    raise ValueError(f"storage {printable(key)} claims {count} elements and {has}")
                if dtype == torch.bool and (content > 1).any():
                    raise ValueError(f"storage {printable(key)} contains values other than 0 and 1")
                self.push(Storage(content, dtype, count))
            case _:
                raise ForbiddenContentError("a persistent id that is not a storage")

    def call(self, _: None) -> None:
        """Do one of the three allowed calls."""
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
    "PROTO": _Reader.ignore,
    "STOP": _Reader.ignore,
    "MARK": _Reader.mark,
    "NONE": lambda reader, _: reader.push(None),
    "NEWTRUE": lambda reader, _: reader.push(True),
    "NEWFALSE": lambda reader, _: reader.push(False),
    "BININT": _Reader.push,
    "BININT1": _Reader.push,
    "BININT2": _Reader.push,
    "LONG1": _Reader.push_integer,
    "BINFLOAT": _Reader.push,
    "BINUNICODE": _Reader.push,
    "EMPTY_TUPLE": lambda reader, _: reader.push(()),
    "EMPTY_LIST": lambda reader, _: reader.push([]),
    "EMPTY_DICT": lambda reader, _: reader.push({}),
    "TUPLE": lambda reader, _: reader.push(tuple(reader.pop_mark())),
    "TUPLE1": lambda reader, _: reader.make_tuple(1),
    "TUPLE2": lambda reader, _: reader.make_tuple(2),
    "TUPLE3": lambda reader, _: reader.make_tuple(3),
    "APPEND": lambda reader, _: reader.append([reader.stack.pop()]),
    "APPENDS": lambda reader, _: reader.append(reader.pop_mark()),
    "SETITEM": lambda reader, _: reader.set_items([reader.stack.pop(-2), reader.stack.pop()]),
    "SETITEMS": lambda reader, _: reader.set_items(reader.pop_mark()),
    "BINPUT": _Reader.put,
    "LONG_BINPUT": _Reader.put,
    "BINGET": _Reader.get,
    "LONG_BINGET": _Reader.get,
    "GLOBAL": _Reader.push_global,
    "BINPERSID": _Reader.push_storage,
    "REDUCE": _Reader.call,
}
