"""Check plain values against type annotations, and build dataclasses from them."""

from __future__ import annotations

import math
import types
from collections.abc import Iterator
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, fields, is_dataclass
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

from app.config.limits import MAX_INT_BITS
from app.runtime.errors import ConfigIssue, did_you_mean, join_choices

T = TypeVar("T")
MISSING = "???"
UNKNOWN = "?"  # depends on a missing value, which is reported itself


@dataclass(frozen=True)
class Range:
    """Bounds of a number, for use in `Annotated`.

    Attributes:
        low: Smallest allowed value.
        high: Largest allowed value.
        exclusive: Exclude `low` itself.
    """

    low: float
    high: float = math.inf
    exclusive: bool = False

    def contains(self, value: Any) -> bool:
        above = self.low < value if self.exclusive else self.low <= value
        return bool(above and value <= self.high)

    def __str__(self) -> str:
        low = f"{'above' if self.exclusive else 'of at least'} {_format_bound(self.low)}"
        return low + (f" and at most {_format_bound(self.high)}" if self.high < math.inf else "")


def _format_bound(bound: float) -> str:
    return f"{bound:g}" if isinstance(bound, float) else str(bound)


@cache
def field_types(cls: type) -> dict[str, Any]:
    """Resolved annotations of a dataclass."""
    return get_type_hints(cls, include_extras=True)


def iter_issues(key: str, value: object, expected: Any) -> Iterator[ConfigIssue]:
    """Yield an issue for every value at or below `key` that does not match its type."""
    if value == UNKNOWN:
        return
    if value == MISSING:
        yield ConfigIssue(key, f" has no value; set it with {key or 'key'}=... on the command line")
    elif is_dataclass(expected) and isinstance(expected, type) and isinstance(value, dict):
        yield from _dataclass_issues(key, value, expected)
    elif isinstance(value, dict) and (entry := _entry_type(expected, dict)) is not None:
        for name, item in value.items():
            yield from iter_issues(f"{key}.{name}", item, entry)
    elif isinstance(value, list) and (entry := _entry_type(expected, list)) is not None:
        for index, item in enumerate(value):
            yield from iter_issues(f"{key}.{index}", item, entry)
    elif (only := only_dataclass(expected)) is not None and isinstance(value, dict):
        yield from _dataclass_issues(key, value, only)
    elif not matches_type(value, expected):
        close = did_you_mean(str(value), _literal_values(expected))
        yield ConfigIssue(
            key, f"={value!r} is not valid; allowed: {describe_type(expected)}{close}"
        )
    elif isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
        problem = f"={value!r} is too large for a checkpoint; allowed: {MAX_INT_BITS} bits"
        yield ConfigIssue(key, problem)


def _dataclass_issues(key: str, value: dict[str, Any], cls: type) -> Iterator[ConfigIssue]:
    expected = field_types(cls)
    prefix = f"{key}." if key else ""
    for name in value.keys() - expected.keys():
        close = did_you_mean(str(name), expected)
        has = f"{key or 'the configuration'} has: {join_choices(expected)}"
        yield ConfigIssue(
            f"{prefix}{name}", f"={_short_repr(value[name])} is not a known key; {has}{close}"
        )
    for name, type_ in expected.items():
        if name in value:
            yield from iter_issues(f"{prefix}{name}", value[name], type_)
        elif name in _required_fields(cls):
            yield ConfigIssue(f"{prefix}{name}", f" is missing; allowed: {describe_type(type_)}")


def _required_fields(cls: type) -> set[str]:
    return {field.name for field in fields(cls) if field.default is NO_DEFAULT}


def _short_repr(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def alternatives(expected: Any) -> tuple[Any, ...]:
    """Members of a union, or the type alone."""
    union = get_origin(expected) in (Union, types.UnionType)
    return get_args(expected) if union else (expected,)


def only_dataclass(expected: Any) -> type | None:
    """Return the dataclass among the alternatives of a type, or None."""
    found = [x for x in alternatives(expected) if isinstance(x, type) and is_dataclass(x)]
    return found[0] if found else None


def _entry_type(expected: Any, kind: type) -> Any:
    """Return the type of the entries of a `kind` (list or dict) among the alternatives, or None."""
    found = [x for x in alternatives(expected) if get_origin(x) is kind]
    return get_args(found[0])[-1] if found else None


def _literal_values(expected: Any) -> list[str]:
    literals = [x for x in alternatives(expected) if get_origin(x) is Literal]
    return [str(value) for literal in literals for value in get_args(literal)]


def matches_type(value: object, expected: Any) -> bool:
    """Return whether a plain value (number, string, list, dict, None) is of a type."""
    if expected is Any:
        return True
    if expected is None or expected is type(None):
        return value is None
    origin, arguments = get_origin(expected), get_args(expected)
    if origin in (Union, types.UnionType):
        return any(matches_type(value, alternative) for alternative in arguments)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin is Annotated:
        return matches_type(value, arguments[0]) and all(
            bound.contains(value) for bound in arguments[1:] if isinstance(bound, Range)
        )
    if origin is list:
        return isinstance(value, list) and all(matches_type(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    if expected is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if expected is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, expected)


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
        bounds = " ".join(str(x) for x in arguments[1:] if isinstance(x, Range))
        return f"{describe_type(arguments[0])} {bounds}".strip()
    if origin is list:
        return f"a list of: {describe_type(arguments[0])}"
    if origin is dict or (isinstance(expected, type) and is_dataclass(expected)):
        return "a group of keys"
    return names.get(expected, str(expected))


def to_dataclass(value: Any, expected: type[T]) -> T:
    """Convert a dict that has been checked to a dataclass, nested ones included."""
    types_ = field_types(cast("type", expected))
    arguments = {name: _convert(item, types_[name]) for name, item in value.items()}
    return expected(**arguments)


def _convert(value: Any, expected: Any) -> Any:
    cls = only_dataclass(expected)
    if cls is not None and isinstance(value, dict):
        return to_dataclass(value, cls)
    entry = _entry_type(expected, dict)
    if only_dataclass(entry) is not None and isinstance(value, dict):
        return {name: _convert(item, entry) for name, item in value.items()}
    return value
