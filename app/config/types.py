"""Plain values against types: what does not fit, in words, and dataclasses from what does."""

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

from app.config.limits import BITS
from app.runtime.errors import ConfigIssue, nearest, one_of

T = TypeVar("T")
MISSING = "???"
UNKNOWN = "?"  # made of a missing value, which is named itself


@dataclass(frozen=True)
class Range:
    """Bounds of a number, to be used in `Annotated`; `above` leaves out the lower one."""

    low: float
    high: float = math.inf
    above: bool = False

    def holds(self, value: Any) -> bool:
        above = self.low < value if self.above else self.low <= value
        return bool(above and value <= self.high)

    def __str__(self) -> str:
        low = f"{'above' if self.above else 'of at least'} {_number(self.low)}"
        return low + (f" and at most {_number(self.high)}" if self.high < math.inf else "")


def _number(bound: float) -> str:
    return f"{bound:g}" if isinstance(bound, float) else str(bound)


@cache
def hints(cls: type) -> dict[str, Any]:
    """The resolved annotations of a dataclass."""
    return get_type_hints(cls, include_extras=True)


def iter_issues(key: str, value: object, expected: Any) -> Iterator[ConfigIssue]:
    """Every place at or below `key` whose value does not fit the type."""
    if value == UNKNOWN:
        return
    if value == MISSING:
        yield ConfigIssue(
            key, f" has no value; give one, as {key or 'key'}=... on the command line"
        )
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
        close = nearest(str(value), _words(expected))
        yield ConfigIssue(key, f"={value!r} does not fit; allowed: {describe(expected)}{close}")
    elif isinstance(value, int) and value.bit_length() > BITS:
        problem = f"={value!r} does not fit into a checkpoint; allowed: {BITS} bits"
        yield ConfigIssue(key, problem)


def _dataclass_issues(key: str, value: dict[str, Any], cls: type) -> Iterator[ConfigIssue]:
    expected = hints(cls)
    prefix = f"{key}." if key else ""
    for name in value.keys() - expected.keys():
        close = nearest(str(name), expected)
        has = f"{key or 'the configuration'} has: {one_of(expected)}"
        yield ConfigIssue(
            f"{prefix}{name}", f"={_short(value[name])} is not a known key; {has}{close}"
        )
    for name, type_ in expected.items():
        if name in value:
            yield from iter_issues(f"{prefix}{name}", value[name], type_)
        elif name in _wanted(cls):
            yield ConfigIssue(f"{prefix}{name}", f" is missing; allowed: {describe(type_)}")


def _wanted(cls: type) -> set[str]:
    """The fields of a dataclass that have no default."""
    return {field.name for field in fields(cls) if field.default is NO_DEFAULT}


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def alternatives(expected: Any) -> tuple[Any, ...]:
    """The members of a union, or the type alone."""
    union = get_origin(expected) in (Union, types.UnionType)
    return get_args(expected) if union else (expected,)


def only_dataclass(expected: Any) -> type | None:
    """The dataclass among the alternatives of a type; None where there is none."""
    found = [x for x in alternatives(expected) if isinstance(x, type) and is_dataclass(x)]
    return found[0] if found else None


def _entry_type(expected: Any, kind: type) -> Any:
    """The type of the entries of the alternative that is a `kind`, or None."""
    found = [x for x in alternatives(expected) if get_origin(x) is kind]
    return get_args(found[0])[-1] if found else None


def _words(expected: Any) -> list[str]:
    literals = [x for x in alternatives(expected) if get_origin(x) is Literal]
    return [str(word) for literal in literals for word in get_args(literal)]


def matches_type(value: object, expected: Any) -> bool:
    """Whether a plain value (number, text, list, dict, None) is of the type."""
    if expected is Any:
        return True
    if expected is None or expected is type(None):
        return value is None
    origin, arguments = get_origin(expected), get_args(expected)
    if origin in (Union, types.UnionType):
        return any(matches_type(value, alternative) for alternative in arguments)
    if origin is Literal:
        return any(value == word and type(value) is type(word) for word in arguments)
    if origin is Annotated:
        return matches_type(value, arguments[0]) and all(
            bound.holds(value) for bound in arguments[1:] if isinstance(bound, Range)
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


def describe(expected: Any) -> str:
    """The type in a user's words."""
    names = {
        int: "a whole number",
        float: "a number",
        str: "a text",
        bool: "true or false",
        type(None): "null",
        None: "null",
        Any: "anything",
    }
    origin, arguments = get_origin(expected), get_args(expected)
    if origin in (Union, types.UnionType):
        return ", or ".join(describe(alternative) for alternative in arguments)
    if origin is Literal:
        return ", ".join(str(word) for word in arguments)
    if origin is Annotated:
        bounds = " ".join(str(x) for x in arguments[1:] if isinstance(x, Range))
        return f"{describe(arguments[0])} {bounds}".strip()
    if origin is list:
        return f"a list of: {describe(arguments[0])}"
    if origin is dict or (isinstance(expected, type) and is_dataclass(expected)):
        return "a group of keys"
    return names.get(expected, str(expected))


def to_dataclass(value: Any, expected: type[T]) -> T:
    """The dataclass that a checked dict describes."""
    types_ = hints(cast("type", expected))
    given = {name: _value(part, types_[name]) for name, part in value.items()}
    return expected(**given)


def _value(value: Any, expected: Any) -> Any:
    cls = only_dataclass(expected)
    if cls is not None and isinstance(value, dict):
        return to_dataclass(value, cls)
    entry = _entry_type(expected, dict)
    if only_dataclass(entry) is not None and isinstance(value, dict):
        return {name: _value(part, entry) for name, part in value.items()}
    return value
