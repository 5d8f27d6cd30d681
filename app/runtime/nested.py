"""Tensors in tuples, lists and dicts: batches, outputs and targets of any form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from app.runtime.errors import UserError, nearest, one_of

Nested = Any  # a tensor, or tuples, lists and dicts of them
Key = int | str | list[Any] | dict[str, Any] | None


def pick(nested: Nested, key: Key) -> Nested:
    """The part that a key names.

    Args:
        nested: For instance a batch.
        key: A position, a name, `outer.inner`, a list or dict of keys (which gives a tuple or
            dict of parts), or None for the whole.

    Raises:
        UserError: There is no such part.
    """
    if key is None:
        return nested
    if isinstance(key, list):
        return tuple(pick(nested, one) for one in key)
    if isinstance(key, dict):
        return {name: pick(nested, one) for name, one in key.items()}
    if isinstance(key, str):
        for name in key.split("."):
            nested = _named(nested, name)
        return nested
    if not isinstance(nested, (tuple, list)) or not -len(nested) <= key < len(nested):
        raise UserError(f"there is no part {key}: it is {describe(nested)}")
    return nested[key]


def _named(nested: Nested, name: str) -> Nested:
    if isinstance(nested, dict) and name in nested:
        return nested[name]
    if isinstance(nested, dict):
        raise UserError(f"there is no {name!r}; it has: {one_of(nested)}{nearest(name, nested)}")
    if isinstance(nested, (tuple, list)) and name.isdigit() and int(name) < len(nested):
        return nested[int(name)]
    raise UserError(f"there is no {name!r}: it is {describe(nested)}")


def replace(nested: Nested, key: int | str, value: Nested) -> Nested:
    """The same with another part where `pick` finds the one of that key.

    Raises:
        UserError: There is no such part.
    """
    first, _, rest = str(key).partition(".") if isinstance(key, str) else (key, "", "")
    inner = replace(pick(nested, first), rest, value) if rest else value
    if isinstance(nested, dict):
        pick(nested, first)
        return {**nested, first: inner}
    pick(nested, first)
    place = int(first) % len(nested)
    parts = [inner if index == place else part for index, part in enumerate(nested)]
    return parts if isinstance(nested, list) else tuple(parts)


def map_tensors(function: Callable[[Tensor], Tensor], nested: Nested) -> Nested:
    """The same form with the function applied to each tensor; other leaves stay."""
    if isinstance(nested, Tensor):
        return function(nested)
    if isinstance(nested, dict):
        return {name: map_tensors(function, part) for name, part in nested.items()}
    if isinstance(nested, (tuple, list)):
        parts = [map_tensors(function, part) for part in nested]
        if isinstance(nested, tuple):
            return type(nested)(*parts) if hasattr(nested, "_fields") else tuple(parts)
        return parts
    return nested


def slice_batch(nested: Nested, part: slice, count: int) -> Nested:
    """Some samples of a batch of so many: of its tensors, and of lists of names and the like."""
    if isinstance(nested, list) and len(nested) == count and not any(True for _ in tensors(nested)):
        return nested[part]
    if isinstance(nested, Tensor):
        return nested[part] if nested.ndim and len(nested) == count else nested
    if isinstance(nested, dict):
        return {name: slice_batch(inner, part, count) for name, inner in nested.items()}
    if isinstance(nested, (tuple, list)):
        parts = [slice_batch(inner, part, count) for inner in nested]
        if isinstance(nested, tuple):
            return type(nested)(*parts) if hasattr(nested, "_fields") else tuple(parts)
        return parts
    return nested


def concat(parts: list[Nested]) -> Nested:
    """Batches as one, whatever their form; single numbers of batches in a row."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts) if first.ndim else torch.stack(parts)
    if first is None:
        return None
    if isinstance(first, dict):
        return {name: concat([part[name] for part in parts]) for name in first}
    if isinstance(first, list) and not any(True for _ in tensors(first)):
        return [name for part in parts for name in part]
    return tuple(concat(list(group)) for group in zip(*parts, strict=True))


def tensors(nested: Nested) -> Iterator[Tensor]:
    """All tensors, from left to right."""
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, (tuple, list, dict)):
        for part in nested.values() if isinstance(nested, dict) else nested:
            yield from tensors(part)


def count_samples(batch: Nested) -> int:
    """The length of the first tensor that has one.

    Raises:
        UserError: There is no such tensor.
    """
    found = next((len(tensor) for tensor in tensors(batch) if tensor.ndim), None)
    if found is None:
        raise UserError(f"a batch without a tensor of samples: {describe(batch)}")
    return found


def describe(nested: Nested) -> str:
    """Shapes and types in words, for errors."""
    if isinstance(nested, Tensor):
        kind = str(nested.dtype).removeprefix("torch.")
        return f"a {kind} tensor of shape {list(nested.shape)}"
    if isinstance(nested, dict):
        parts = ", ".join(f"{name!r}: {describe(part)}" for name, part in nested.items())
        return f"a dict of {parts}" if parts else "an empty dict"
    if isinstance(nested, (tuple, list)):
        parts = ", ".join(map(describe, nested))
        return f"a {type(nested).__name__} of {parts}" if parts else "empty"
    return f"a {type(nested).__name__}"
