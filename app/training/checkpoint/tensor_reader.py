"""Make tensors from what a checkpoint file declares, if it fits into the storages of the file."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MAX_SIZE = 2**60  # largest size, stride or offset of a tensor
MAX_DIMENSIONS = 64
STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.storage.UntypedStorage": torch.uint8,
}
DTYPES = {  # of tensors with an untyped storage
    f"torch.{name}": getattr(torch, name)
    for name in ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2")
}


class ForbiddenContentError(ValueError):
    """A file contains more than tensors and plain values."""


@dataclass(frozen=True)
class Storage:
    """Bytes of a storage, with the dtype and number of elements that the file declares."""

    content: Tensor
    dtype: torch.dtype
    count: int


def make_tensor(
    dtype: torch.dtype,
    storage: Storage,
    offset: Any,
    size: Any,
    stride: Any,
    grad: Any,
    hooks: Any,
) -> Tensor:
    """Return a view of the storage; the arguments are those of `torch._utils._rebuild_tensor_v2`.

    Raises:
        ForbiddenContentError: The tensor has hooks or other Python state.
        ValueError: The view reaches beyond the storage, or has more elements than it.
    """
    kinds = [type(part) for part in (size, stride, grad, hooks)]
    if kinds != [tuple, tuple, bool, OrderedDict] or (grad and not dtype.is_floating_point):
        raise ForbiddenContentError("a tensor with hooks or other state")
    if len(size) != len(stride) or len(size) > MAX_DIMENSIONS:
        raise ValueError(f"a tensor with {len(size)} sizes and {len(stride)} strides")
    numbers = (offset, *size, *stride)
    if any(type(number) is not int or not 0 <= number < MAX_SIZE for number in numbers):
        raise ValueError("a tensor with an impossible size, stride or offset")
    has = storage.count * storage.dtype.itemsize // dtype.itemsize
    wanted = math.prod(size)
    end = offset + sum((n - 1) * by for n, by in zip(size, stride, strict=True)) + 1
    if wanted > has or (end if wanted else offset) > has:
        raise ValueError(f"a tensor of size {printable(size)}, but its storage has {has} elements")
    view = torch.empty(0, dtype=dtype).set_(storage.content.untyped_storage(), offset, size, stride)
    return view.requires_grad_(grad)


def printable(value: object) -> str:
    """Return the value as printable text of at most 100 characters."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
