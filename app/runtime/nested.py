"""Work with nested tuples, lists and dicts of tensors: batches, outputs and targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from app.runtime.errors import UserError, did_you_mean, join_choices

Nested = Any  # a tensor, or nested tuples, lists and dicts of tensors
Key = int | str | list[Any] | dict[str, Any] | None


def pick(nested: Nested, key: Key) -> Nested:
    """Return the item selected by a key.

    Args:
        nested: For example a batch.
        key: A position, a name, `outer.inner`, a list or dict of keys (which returns a tuple or
            dict of items), or None for everything.

    Raises:
        UserError: There is no such item.
    """
    if key is None:
        return nested
    if isinstance(key, list):
        return tuple(pick(nested, inner) for inner in key)
    if isinstance(key, dict):
        return {name: pick(nested, inner) for name, inner in key.items()}
    if isinstance(key, str):
        for name in key.split("."):
            nested = _pick_by_name(nested, name)
        return nested
    if not isinstance(nested, (tuple, list)) or not -len(nested) <= key < len(nested):
        raise UserError(f"there is no item {key} in {describe(nested)}")
    return nested[key]


def _pick_by_name(nested: Nested, name: str) -> Nested:
    if isinstance(nested, dict) and name in nested:
        return nested[name]
    if isinstance(nested, dict):
        raise UserError(
            f"there is no {name!r}; available: {join_choices(nested)}{did_you_mean(name, nested)}"
        )
    if isinstance(nested, (tuple, list)) and name.isdigit() and int(name) < len(nested):
        return nested[int(name)]
    raise UserError(f"there is no {name!r} in {describe(nested)}")


def replace(nested: Nested, key: int | str, value: Nested) -> Nested:
    """Return a copy with another value for the item that `pick` selects.

    Raises:
        UserError: There is no such item.
    """
    first, _, rest = str(key).partition(".") if isinstance(key, str) else (key, "", "")
    inner = replace(pick(nested, first), rest, value) if rest else value
    if isinstance(nested, dict):
        pick(nested, first)
        return {**nested, first: inner}
    pick(nested, first)
    position = int(first) % len(nested)
    parts = [inner if index == position else part for index, part in enumerate(nested)]
    return parts if isinstance(nested, list) else tuple(parts)


def map_tensors(function: Callable[[Tensor], Tensor], nested: Nested) -> Nested:
    """Apply a function to each tensor; keep the structure and all other values."""
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
    """Return some samples of a batch.

    Args:
        nested: Tensors and lists of other values (such as file names) of length `count` are
            sliced; everything else is kept.
        part: The samples to return.
        count: Number of samples in the batch.
    """
    if isinstance(nested, list) and len(nested) == count and not _has_tensors(nested):
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
    """Concatenate batches of the same structure; scalar tensors are stacked."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts) if first.ndim else torch.stack(parts)
    if first is None:
        return None
    if isinstance(first, dict):
        return {name: concat([part[name] for part in parts]) for name in first}
    if isinstance(first, list) and not _has_tensors(first):
        return [name for part in parts for name in part]
    return tuple(concat(list(group)) for group in zip(*parts, strict=True))


def _has_tensors(nested: Nested) -> bool:
    return any(True for _ in iter_tensors(nested))


def iter_tensors(nested: Nested) -> Iterator[Tensor]:
    """Yield all tensors from left to right."""
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, (tuple, list, dict)):
        for part in nested.values() if isinstance(nested, dict) else nested:
            yield from iter_tensors(part)


def count_samples(batch: Nested) -> int:
    """Return the length of the first tensor that is not a scalar.

    Raises:
        UserError: There is no such tensor.
    """
    count = next((tensor.shape[0] for tensor in iter_tensors(batch) if tensor.ndim), None)
    if count is None:
        raise UserError(f"the batch contains no tensor of samples: {describe(batch)}")
    return count


def describe(nested: Nested) -> str:
    """Describe shapes and types for error messages."""
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
