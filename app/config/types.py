"""Check plain values against dataclasses with pydantic, and describe what is allowed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, cast

from app.config.nested import KeyPath, dotted, get_at, iter_children, iter_leaves, shorten
from app.runtime.errors import ConfigIssue, UserError, did_you_mean, join_choices
from app.runtime.small_files import MAX_INT_BITS

T = TypeVar("T")
Schema = dict[str, Any]  # JSON schema
MISSING = "???"
JSON_TYPES = (str, int, float, NoneType, dict, list)  # empty groups and lists are leaves
MAX_PRINTED_BITS = 10_000  # of an integer
UNKNOWN = "?"  # depends on a missing value, which is reported itself
TYPE_NAMES = {
    "integer": "an integer",
    "number": "a number",
    "string": "a string",
    "boolean": "true or false",
    "null": "null",
    "object": "a group of keys",
}
READ_FIELDS = {"strict": True, "extra": "ignore"}  # pydantic's options for the content of files
BOUND_NAMES = {
    "minimum": "of at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}


def to_dataclass(value: Any, cls: type[T]) -> T:
    """Convert a dict to a dataclass, nested ones included.

    Raises:
        pydantic.ValidationError: A value is not of the type that the dataclass declares.
    """
    # From Python values, strict validation accepts only instances of the dataclass.
    return cast("T", _adapter(cast("type", cls)).validate_json(json.dumps(value, default=repr)))


def parse_content(content: dict[str, Any], cls: type[T], source: Path) -> T:
    """Convert the content of a file to a dataclass.

    Args:
        content: Plain values.
        cls: The dataclass; it may ignore additional keys.
        source: The file, for errors.

    Raises:
        UserError: A value is not of the type that the dataclass declares.
    """
    from pydantic import ValidationError

    try:
        return to_dataclass(content, cls)
    except ValidationError as error:
        issue = next(iter_issues("", content, cls), error.errors()[0]["msg"])
        raise UserError(f"{source} is damaged: {issue}") from error


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
    leaves = {path: (f"{prefix}{dotted(path)}", leaf) for path, leaf in iter_leaves(value)}
    huge = [name for name, leaf in leaves.values() if _bits(leaf) > MAX_PRINTED_BITS]
    if huge:  # Python does not convert them to text
        yield from (ConfigIssue(name, " is too large for a checkpoint") for name in huge)
        return
    errors = _type_errors(value, cls)
    for path, kind in errors.items():
        found, name = get_at(value, path), f"{prefix}{dotted(path)}"
        if found not in (MISSING, UNKNOWN):
            yield ConfigIssue(name, _describe_error(kind, found, _json_schema(cls), path, name))
    for path, (name, leaf) in leaves.items():
        if leaf == MISSING:
            yield ConfigIssue(name, f" has no value; set it with {name}=... on the command line")
        elif path in errors:
            continue
        elif _bits(leaf) > MAX_INT_BITS:
            problem = f"={leaf!r} is too large for a checkpoint; allowed: {MAX_INT_BITS} bits"
            yield ConfigIssue(name, problem)
        elif not isinstance(leaf, JSON_TYPES):
            allowed = "allowed: numbers, strings, true, false, null"
            yield ConfigIssue(name, f"={shorten(leaf)} is of type {type(leaf).__name__}; {allowed}")


def _bits(leaf: Any) -> int:
    return leaf.bit_length() if isinstance(leaf, int) else 0


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


def _describe_error(kind: str, found: Any, schema: Schema, path: KeyPath, name: str) -> str:
    if kind == "json_invalid":
        return "the configuration contains parts of Unicode characters"
    if kind == "unexpected_keyword_argument":
        groups = _options(schema, _schema_at(schema, path[:-1]))
        names = [field for group in groups for field in group.get("properties", ())]
        has = f"{name.rpartition('.')[0] or 'the configuration'} has: {join_choices(names)}"
        close = did_you_mean(str(path[-1]), names)
        return f"={shorten(found)} is not a known key; {has}{close}"
    expected = _schema_at(schema, path)
    allowed = f"allowed: {_describe(schema, expected)}"
    if kind == "missing":
        return f" is missing; {allowed}"
    literals = [str(x) for option in _options(schema, expected) for x in _literals(option)]
    hint = did_you_mean(str(found), literals) or _list_hint(schema, expected, found, name)
    return f"={found!r} is not valid; {allowed}{hint}"


def _list_hint(schema: Schema, expected: Schema, found: Any, name: str) -> str:
    """Return how a list is typed, or how several values of a sweep are."""
    takes_list = any("items" in option for option in _options(schema, expected))
    if takes_list and isinstance(found, str | int | float):
        return f"; did you mean '{name}=[{found}]'?"
    if not takes_list and isinstance(found, list) and found:
        return f"; for one job per value: -m {name}={','.join(map(str, found))}"
    return ""


@cache
def _json_schema(cls: type) -> Schema:
    schema: Schema = _adapter(cls).json_schema()
    return schema


def _schema_at(schema: Schema, path: KeyPath) -> Schema:
    """Return the part of a JSON schema that describes the value at a path."""
    node = schema
    for name in path:
        children = [_child_schema(option, name) for option in _options(schema, node)]
        node = next(child for child in children if child is not None)
    return node


def _child_schema(option: Schema, name: str | int) -> Schema | None:
    others = option.get("items" if isinstance(name, int) else "additionalProperties")
    child: Schema | None = option.get("properties", {}).get(name, others or None)
    return child


def _options(schema: Schema, node: Schema) -> list[Schema]:
    """Return the members of a union, or the node alone."""
    definitions = schema.get("$defs", {})
    return [
        definitions[option["$ref"].rpartition("/")[2]] if "$ref" in option else option
        for option in node.get("anyOf", [node])
    ]


def _literals(option: Schema) -> list[Any]:
    return [option["const"]] if "const" in option else option.get("enum", [])


def _describe(schema: Schema, node: Schema) -> str:
    return ", or ".join(_describe_option(schema, option) for option in _options(schema, node))


def _describe_option(schema: Schema, option: Schema) -> str:
    if literals := _literals(option):
        return ", ".join(map(str, literals))
    if "items" in option:
        return f"a list of: {_describe(schema, option['items'])}"
    name = TYPE_NAMES.get(option.get("type", ""), "anything")
    bounds = [
        f"{text} {_format_bound(option[key])}" for key, text in BOUND_NAMES.items() if key in option
    ]
    return f"{name} {' and '.join(bounds)}".strip()


def _format_bound(bound: float) -> str:
    return f"{bound:g}" if isinstance(bound, float) else str(bound)


def iter_fields(cls: type) -> Iterator[KeyPath]:
    """Yield the path of every key that a dataclass declares, a group before its own keys."""
    yield from _iter_fields(_json_schema(cls), _json_schema(cls), ())


def _iter_fields(schema: Schema, node: Schema, path: KeyPath) -> Iterator[KeyPath]:
    for group in _options(schema, node):
        for name, child in group.get("properties", {}).items():
            yield (*path, name)
            yield from _iter_fields(schema, child, (*path, name))
