"""Walk nested dicts and lists of plain values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

KeyPath = tuple[str | int, ...]  # names in dicts and indices in lists, from the top


def iter_children(node: Any) -> Iterator[tuple[str | int, Any]]:
    """Yield name and value of each entry of a dict, or index and value of each list item."""
    if isinstance(node, dict):
        yield from node.items()
    elif isinstance(node, list):
        yield from enumerate(node)


def iter_leaves(node: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yield the path and the value of everything that contains nothing else."""
    if not (isinstance(node, (dict, list)) and node):
        yield path, node
    for name, child in iter_children(node):
        yield from iter_leaves(child, (*path, name))


def map_strings(function: Callable[[str], Any], node: Any) -> Any:
    """Return a copy in which every string, except keys of dicts, is replaced by its result."""
    if isinstance(node, dict):
        return {name: map_strings(function, child) for name, child in node.items()}
    if isinstance(node, list):
        return [map_strings(function, child) for child in node]
    return function(node) if isinstance(node, str) else node


def get_at(node: Any, path: Iterable[str | int]) -> Any:
    """Return the value at a path, or None if there is none."""
    for name in path:
        node = get_child(node, name)
    return node


def get_child(node: Any, name: str | int) -> Any:
    """Return the entry of a dict or the item of a list, or None if there is none."""
    if isinstance(node, dict):
        return node.get(name)
    try:
        return node[int(name)] if isinstance(node, list) else None
    except (ValueError, IndexError):
        return None


def dotted(path: KeyPath) -> str:
    """Return a path as a key of the configuration, such as `model.hidden.0`."""
    return ".".join(map(str, path))


def shorten(value: object) -> str:
    """Return a value as one short line: the `_target_` of a component, else its repr."""
    target = value.get("_target_") if isinstance(value, dict) else None
    text = str(target) if target else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
