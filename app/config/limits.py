"""Limits on the size and depth of configurations, so that none can exhaust memory or time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.grammar_parser import parse

from app.config.nested import KeyPath, dotted, get_child, iter_children
from app.runtime.errors import ConfigIssue
from app.runtime.small_files import MAX_NESTING

MAX_OVERRIDE_LENGTH = 10_000  # characters of one override
MAX_FILE_BYTES = 1_000_000  # of a configuration file
MAX_FILE_VALUES = 20_000  # in a configuration file; aliases count each time they are used
MAX_EXPANDED_SIZE = 1_000_000  # characters and values of a resolved configuration
INTERPOLATION_SIZE = (
    100  # of one interpolation, in characters: its cost, or what a resolver returns
)
INTERPOLATION_DEPTH = 4  # levels of recursion that OmegaConf needs for an interpolation
TOO_DEEP = f" is nested more than {MAX_NESTING} deep through its interpolations"
KEY_RESOLVERS = ("oc.select", "oc.deprecated", "oc.dict.keys", "oc.dict.values")  # take a key
SEXAGESIMAL = re.compile(r"\d(?::[0-5]?\d){100}")  # YAML reads 1:30 as 90, slowly if it is long
YAML_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


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
    if SEXAGESIMAL.search(text):
        return "it contains a number of more than 100 parts"
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
        _ExpandedSizes(config, raw).measure((), raw)
    except _ExpansionError as error:
        yield ConfigIssue(dotted(error.path), error.problem)


class _ExpansionError(Exception):
    def __init__(self, path: KeyPath, problem: str) -> None:
        super().__init__(problem)
        self.path, self.problem = path, problem


class _ExpandedSizes:
    """Measures values as if their interpolations were expanded."""

    def __init__(self, config: DictConfig, raw: Any) -> None:
        self.config, self.raw = config, raw
        self.sizes: dict[KeyPath, tuple[int, int]] = {}  # characters and values; depth
        self.active: set[KeyPath] = set()

    def measure(self, path: KeyPath, node: Any) -> tuple[int, int]:
        """Return the number of characters and values of a node, and how deep it is nested."""
        if path in self.active:
            raise _ExpansionError(path, " refers to itself through its interpolations")
        if path not in self.sizes:
            if len(self.active) > 2 * MAX_NESTING:
                raise _ExpansionError(path, TOO_DEEP)
            self.active.add(path)
            self.sizes[path] = self._measure(path, node)
            self.active.remove(path)
        return self.sizes[path]

    def _measure(self, path: KeyPath, node: Any) -> tuple[int, int]:
        size, depth = 1, 1
        if isinstance(node, str):
            size += len(node)
            keys = [self._referenced_key(inner) for inner in interpolations(node)]
            children = [self.measure(*self._find(path, key)) for key in keys if key is not None]
            size += INTERPOLATION_SIZE * len(keys)
            depth = INTERPOLATION_DEPTH if keys else 1
        else:
            children = [self.measure((*path, str(k)), child) for k, child in iter_children(node)]
        size += sum(child_size for child_size, _ in children)
        depth += max((child_depth for _, child_depth in children), default=0)
        if size > MAX_EXPANDED_SIZE:
            problem = f" would expand to more than {MAX_EXPANDED_SIZE:,} characters and values"
            raise _ExpansionError(path, f"{problem} through its interpolations")
        if depth > MAX_NESTING:
            raise _ExpansionError(path, TOO_DEEP)
        return size, depth

    def _referenced_key(self, inner: str) -> str | None:
        """Return the key whose value an interpolation inserts; None if it calls a resolver."""
        resolver, colon, arguments = inner.partition(":")
        if colon and "${" not in resolver:
            is_key = resolver in KEY_RESOLVERS
            return self._resolve_key(arguments.split(",")[0].strip(" '\"")) if is_key else None
        return self._resolve_key(inner)

    def _resolve_key(self, key: str) -> str:
        """Resolve interpolations inside a key; their sizes have been checked before."""
        if "${" not in key:
            return key
        try:
            tree = parse(key)
            return str(self.config.resolve_parse_tree(tree, node=self.config))
        except (OmegaConfBaseException, ValueError, TypeError):
            return key

    def _find(self, path: KeyPath, reference: str) -> tuple[KeyPath, Any]:
        """Return the path and the value that a reference at a path leads to."""
        key = reference.strip().lstrip(".")
        dots = len(reference.strip()) - len(key)
        parent = path[: max(len(path) - dots, 0)] if dots else ()
        target = (*parent, *(name for name in re.split(r"[.\[\]]+", key) if name))
        node: Any = self.raw
        for length, name in enumerate(target):
            if isinstance(node, str):  # an interpolation; everything that it refers to counts
                return target[:length], node
            node = get_child(node, name)
        return target, node


def interpolations(text: str) -> Iterator[str]:
    """Yield the text between each `${` and its `}`, innermost first."""
    starts: list[int] = []
    for match in re.finditer(r"\$\{|\{|\}", text):
        if match[0] != "}":
            starts.append(match.end() if match[0] == "${" else -1)
        elif starts and (start := starts.pop()) >= 0:
            yield text[start : match.start()]
