"""Limits on the size and depth of configurations, so that none can exhaust memory or time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_yaml_loader
from omegaconf.errors import OmegaConfBaseException
from omegaconf.grammar_parser import parse

from app.runtime.errors import ConfigIssue, UserError

MAX_NESTING = 64  # levels of nested lists and dicts, or of interpolations of interpolations
MAX_OVERRIDE_LENGTH = 10_000  # characters of one override
MAX_FILE_BYTES = 1_000_000  # of a configuration file
MAX_FILE_VALUES = 20_000  # in a configuration file; aliases count each time they are used
MAX_EXPANDED_SIZE = 1_000_000  # characters and values of a resolved configuration
RESOLVER_RESULT_SIZE = 100  # assumed characters of a resolver's result
KEY_RESOLVERS = ("oc.select", "oc.deprecated", "oc.dict.keys", "oc.dict.values")  # take a key
MAX_TEXT_LENGTH = 2_000_000  # characters of a saved YAML text
MAX_SCALAR_LENGTH = 50_000  # characters of one value or key in it
MAX_TEXT_VALUES = 100_000  # values in it
MAX_INT_BITS = 64
PLAIN_TYPES = (str, int, float, bool, NoneType, list, dict)
YAML_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

KeyPath = tuple[str, ...]


def override_problem(override: str) -> str | None:
    """Return why an override is too long or too deeply nested to be parsed, or None."""
    if len(override) > MAX_OVERRIDE_LENGTH:
        return f" has {len(override):,} characters; allowed: {MAX_OVERRIDE_LENGTH:,}"
    depth = 0
    for character in override:
        depth += (character in "[{(") - (character in "]})")
        if depth > MAX_NESTING:
            return f" nests brackets more than {MAX_NESTING} deep"
    return None


def yaml_problem(text: str) -> str | None:
    """Return why a YAML file is too large or too deeply nested to be loaded, or None.

    Raises:
        yaml.YAMLError: The text is not valid YAML.
    """
    anchors: dict[str, tuple[int, int]] = {}  # name -> number of values, depth
    stack: list[list[Any]] = [[None, 0, 0]]  # anchor, number of values, depth
    for event in yaml.parse(text, Loader=YAML_LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            stack.append([event.anchor, 1, 0])
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, values, depth = stack.pop()
            anchors[anchor] = values, depth + 1
            _add(stack[-1], *anchors[anchor])
        elif isinstance(event, yaml.ScalarEvent):
            anchors[str(event.anchor)] = 1, 0
            _add(stack[-1], 1, 0)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in anchors:
                return f"the alias *{event.anchor} refers to itself or to an unknown anchor"
            _add(stack[-1], *anchors[event.anchor])
        if stack[-1][1] > MAX_FILE_VALUES:
            return f"it contains more than {MAX_FILE_VALUES:,} values"
        if len(stack) + stack[-1][2] > MAX_NESTING:
            return f"it nests lists and groups more than {MAX_NESTING} deep"
    return None


def _add(collection: list[Any], values: int, depth: int) -> None:
    collection[1] += values
    collection[2] = max(collection[2], depth)


def expansion_issues(config: DictConfig) -> Iterator[ConfigIssue]:
    """Yield an issue if interpolations are circular or expand to more than memory holds.

    The configuration is not resolved for this, except for keys that contain interpolations.
    """
    raw = OmegaConf.to_container(config, resolve=False, enum_to_str=True)
    try:
        _ExpandedSizes(config, raw).size_at((), 0)
    except _ExpansionError as error:
        yield ConfigIssue(".".join(error.path), error.problem)


class _ExpansionError(Exception):
    def __init__(self, path: KeyPath, problem: str) -> None:
        super().__init__(problem)
        self.path, self.problem = path, problem


@dataclass
class _ExpandedSizes:
    """Numbers of characters and values at each path once interpolations are expanded."""

    config: DictConfig
    raw: Any

    def __post_init__(self) -> None:
        self.sizes: dict[KeyPath, int] = {}
        self.active: dict[KeyPath, None] = {}

    def size_at(self, path: KeyPath, depth: int) -> int:
        """Return the expanded size of the value at a path.

        Args:
            path: Keys that lead to the value.
            depth: Number of interpolations followed to get there.
        """
        if path in self.sizes:
            return self.sizes[path]
        if path in self.active:
            raise _ExpansionError(path, " refers to itself through its interpolations")
        if depth > MAX_NESTING:
            raise _ExpansionError(path, f" is a chain of more than {MAX_NESTING} interpolations")
        self.active[path] = None
        self.sizes[path] = size = self._size(path, _get(self.raw, path), depth)
        del self.active[path]
        if size > MAX_EXPANDED_SIZE:
            problem = f" would expand to more than {MAX_EXPANDED_SIZE:,} characters and values"
            raise _ExpansionError(path, f"{problem} through its interpolations")
        return size

    def _size(self, path: KeyPath, value: Any, depth: int) -> int:
        if isinstance(value, (dict, list)):
            names = value if isinstance(value, dict) else range(len(value))
            return 1 + sum(self.size_at((*path, str(name)), depth) for name in names)
        if not isinstance(value, str) or "${" not in value:
            return 1 + len(value) if isinstance(value, str) else 1
        return len(value) + sum(
            self._interpolation_size(path, inner, depth) for inner in interpolations(value)
        )

    def _interpolation_size(self, path: KeyPath, inner: str, depth: int) -> int:
        resolver, colon, arguments = inner.partition(":")
        if colon and "${" not in resolver and resolver not in KEY_RESOLVERS:
            return RESOLVER_RESULT_SIZE
        takes_key = colon and resolver in KEY_RESOLVERS
        key = arguments.split(",")[0].strip(" '\"") if takes_key else inner
        target = _target_path(path, self._resolve_key(key))
        return self.size_at(target, depth + 1) if _exists(self.raw, target) else 1

    def _resolve_key(self, key: str) -> str:
        """Resolve interpolations inside a key; their sizes have been checked before."""
        if "${" not in key:
            return key
        try:
            tree = parse(key)
            return str(self.config.resolve_parse_tree(tree, node=self.config))
        except (OmegaConfBaseException, ValueError, TypeError):
            return key


def interpolations(text: str) -> Iterator[str]:
    """Yield the text between each `${` and its `}`, innermost first."""
    starts: list[int] = []
    for match in re.finditer(r"\$\{|\{|\}", text):
        if match[0] != "}":
            starts.append(match.end() if match[0] == "${" else -1)
        elif starts and (start := starts.pop()) >= 0:
            yield text[start : match.start()]


def _target_path(path: KeyPath, key: str) -> KeyPath:
    dots = len(key) - len(key.lstrip("."))
    names = [name for name in re.split(r"[.\[\]]+", key) if name]
    return (*path[: len(path) - dots], *names) if dots else tuple(names)


def _get(raw: Any, path: KeyPath) -> Any:
    for name in path:
        if isinstance(raw, dict):
            raw = next((value for key, value in raw.items() if str(key) == name), None)
        else:
            raw = raw[int(name)] if isinstance(raw, list) and name.isdigit() else None
    return raw


def _exists(raw: Any, path: KeyPath) -> bool:
    return _get(raw, path) is not None


def load_yaml(text: object, source: str, max_values: int = MAX_TEXT_VALUES) -> Any:
    """Load plain values from a YAML text, with the same rules as OmegaConf.

    Args:
        text: YAML text; any other type is an error.
        source: File or key that contains the text, for errors.
        max_values: Largest number of values; aliases count each time they are used.

    Raises:
        UserError: The text is not YAML, or larger or deeper than any configuration.
    """
    if not isinstance(text, str):
        raise UserError(f"{source} must be a YAML text, not {type(text).__name__}")
    if len(text) > MAX_TEXT_LENGTH:
        raise UserError(f"{source} has {len(text):,} characters; allowed: {MAX_TEXT_LENGTH:,}")
    try:
        _check_events(text, max_values)
        return _check_plain(yaml.load(text, get_yaml_loader()))
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    # Invalid dates and numbers raise ValueError or OverflowError.
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{source} is not YAML: {reason[:200]}") from error


def _check_events(text: str, max_values: int) -> None:
    """Check the number of values before they are constructed."""
    sizes: list[int] = [0]  # of the open collections, outermost first
    names: list[str | None] = []  # their anchors
    anchors: dict[str, int] = {}  # name -> number of values
    for event in yaml.parse(text, yaml.SafeLoader):
        size = 0
        if isinstance(event, yaml.CollectionStartEvent):
            sizes.append(1)
            names.append(event.anchor)
        elif isinstance(event, yaml.CollectionEndEvent):
            size, name = sizes.pop(), names.pop()
            if name:
                anchors[name] = size
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
            if event.anchor:
                anchors[event.anchor] = size
            if len(event.value) > MAX_SCALAR_LENGTH:
                length = len(event.value)
                raise UserError(
                    f"contains a value of {length:,} characters; allowed: {MAX_SCALAR_LENGTH:,}"
                )
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in anchors or event.anchor in names:
                raise UserError("an alias refers to itself or to an unknown anchor")
            size = anchors[event.anchor]
        sizes[-1] += size
        if len(sizes) > MAX_NESTING:
            raise UserError(f"nests values more than {MAX_NESTING} deep")
        if sum(sizes) > max_values:
            raise UserError(f"contains more than {max_values:,} values")


def load_json(text: object, source: str) -> Any:
    """Load plain values from a JSON text.

    Args:
        text: JSON text; any other type is an error.
        source: File or key that contains the text, for errors.

    Raises:
        UserError: The text is not JSON, or deeper than any configuration or table.
    """
    if not isinstance(text, str):
        raise UserError(f"{source} must be a JSON text, not {type(text).__name__}")
    try:
        return _check_plain(json.loads(text))
    except RecursionError as error:
        raise UserError(f"{source}: values nested more than {MAX_NESTING} deep") from error
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    except ValueError as error:
        raise UserError(f"{source} is not JSON: {error}") from error


def _check_plain(value: Any) -> Any:
    """Return the value if it has only JSON types and is not nested too deeply."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_NESTING:
            raise UserError(f"nests values more than {MAX_NESTING} deep")
        for item in level:
            if type(item) not in PLAIN_TYPES:
                raise UserError(
                    f"contains a value of type {type(item).__name__}, which is not supported"
                )
            if type(item) is int and item.bit_length() > MAX_INT_BITS:
                raise UserError(f"contains an integer of more than {MAX_INT_BITS} bits")
        level = [child for item in level for child in _children(item)]
    return value


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, list) else []
