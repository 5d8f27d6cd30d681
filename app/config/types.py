"""Check plain values against dataclasses with pydantic, and describe what is allowed."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from dataclasses import is_dataclass
from functools import cache
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from annotated_types import Ge, Gt, Le

from app.config.limits import MAX_INT_BITS
from app.config.nested import KeyPath, dotted, get_at, iter_children, iter_leaves, shorten
from app.runtime.errors import ConfigIssue, did_you_mean, join_choices

T = TypeVar("T")
MISSING = "???"
UNKNOWN = "?"  # depends on a missing value, which is reported itself


def to_dataclass(value: Any, cls: type[T]) -> T:
    """Convert a dict to a dataclass, nested ones included.

    Raises:
        pydantic.ValidationError: A value is not of the type that the dataclass declares.
    """
    # From Python values, strict validation accepts only instances of the dataclass.
    return cast("T", _adapter(cast("type", cls)).validate_json(json.dumps(value)))


@cache
def _adapter(cls: type) -> Any:
    from pydantic import TypeAdapter  # takes 0.1 s

    return TypeAdapter(cls)


def iter_issues(key: str, value: Any, cls: type) -> Iterator[ConfigIssue]:
    """Yield an issue for every value that does not match the type that a dataclass declares.

    Args:
        key: Key of the dataclass in the configuration; empty for all of it.
        value: Plain value.
        cls: The dataclass; it is strict, and forbids additional keys.
    """
    prefix = f"{key}." if key else ""
    errors = _type_errors(value, cls)
    for path, kind in errors.items():
        found, name = get_at(value, path), f"{prefix}{dotted(path)}"
        if found not in (MISSING, UNKNOWN):
            yield ConfigIssue(name, _describe_error(kind, found, cls, path, name))
    for path, leaf in iter_leaves(value):
        name = f"{prefix}{dotted(path)}"
        if leaf == MISSING:
            yield ConfigIssue(name, f" has no value; set it with {name}=... on the command line")
        elif isinstance(leaf, int) and leaf.bit_length() > MAX_INT_BITS and path not in errors:
            problem = f"={leaf!r} is too large for a checkpoint; allowed: {MAX_INT_BITS} bits"
            yield ConfigIssue(name, problem)


def _type_errors(value: Any, cls: type) -> dict[KeyPath, str]:
    """Return pydantic's kind of error for the path of each invalid, missing or unknown key."""
    from pydantic import ValidationError

    try:
        to_dataclass(value, cls)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False)
        errors = {
            _existing_path(value, item["loc"], item["type"]): item["type"] for item in details
        }
        outer = {path[:length] for path in errors for length in range(len(path))}
        return {path: kind for path, kind in errors.items() if path not in outer}
    return {}


def _existing_path(value: Any, location: KeyPath, kind: str) -> KeyPath:
    """Return the part of pydantic's location that leads to a value.

    The location also names the members of unions that were tried.
    """
    path: KeyPath = ()
    for name in location:
        if name in dict(iter_children(get_at(value, path))):
            path = (*path, name)
    return (*path, location[-1]) if kind == "missing" else path


def _describe_error(kind: str, found: Any, cls: type, path: KeyPath, name: str) -> str:
    if kind == "unexpected_keyword_argument":
        allowed = field_types(only_dataclass(_annotation_at(cls, path[:-1])) or cls)
        has = f"{name.rpartition('.')[0] or 'the configuration'} has: {join_choices(allowed)}"
        close = did_you_mean(str(path[-1]), allowed)
        return f"={shorten(found)} is not a known key; {has}{close}"
    if kind == "json_invalid":
        return "the configuration contains parts of Unicode characters"
    expected = _annotation_at(cls, path)
    if kind == "missing":
        return f" is missing; allowed: {describe_type(expected)}"
    close = did_you_mean(str(found), _literal_values(expected))
    return f"={found!r} is not valid; allowed: {describe_type(expected)}{close}"


def _annotation_at(expected: Any, path: KeyPath) -> Any:
    """Return the annotation of the value at a path."""
    for name in path:
        if (group := only_dataclass(expected)) is not None:
            expected = field_types(group)[str(name)]
        else:
            collections = [x for x in alternatives(expected) if get_origin(x) in (dict, list)]
            expected = get_args(collections[0])[-1]
    return expected


@cache
def field_types(cls: type) -> dict[str, Any]:
    """Resolved annotations of a dataclass."""
    return get_type_hints(cls, include_extras=True)


def alternatives(expected: Any) -> tuple[Any, ...]:
    """Members of a union, or the type alone."""
    union = get_origin(expected) in (Union, types.UnionType)
    return get_args(expected) if union else (expected,)


def only_dataclass(expected: Any) -> type | None:
    """Return the dataclass among the alternatives of a type, or None."""
    found = [x for x in alternatives(expected) if isinstance(x, type) and is_dataclass(x)]
    return found[0] if found else None


def _literal_values(expected: Any) -> list[str]:
    literals = [x for x in alternatives(expected) if get_origin(x) is Literal]
    return [str(value) for literal in literals for value in get_args(literal)]


def describe_type(expected: Any) -> str:
    """Describe a type for an error message."""
    names = {
        int: "an integer",
        float: "a number",
        str: "a string",
        bool: "true or false",
        type(None): "null",
        None: "null",
        Any: "anything",
    }
    origin, arguments = get_origin(expected), get_args(expected)
    if origin in (Union, types.UnionType):
        return ", or ".join(describe_type(alternative) for alternative in arguments)
    if origin is Literal:
        return ", ".join(str(choice) for choice in arguments)
    if origin is Annotated:
        bounds = " and ".join(_describe_bound(bound) for bound in arguments[1:])
        return f"{describe_type(arguments[0])} {bounds}"
    if origin is list:
        return f"a list of: {describe_type(arguments[0])}"
    if origin is dict or (isinstance(expected, type) and is_dataclass(expected)):
        return "a group of keys"
    return names.get(expected, str(expected))


def _describe_bound(bound: Ge | Gt | Le) -> str:
    match bound:
        case Ge(ge=low):
            return f"of at least {_format_bound(low)}"
        case Gt(gt=low):
            return f"above {_format_bound(low)}"
        case _:
            return f"at most {_format_bound(bound.le)}"


def _format_bound(bound: Any) -> str:
    return f"{bound:g}" if isinstance(bound, float) else str(bound)
