"""How big a configuration may be, so that none can take all memory or all time."""

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

WORD = 10_000  # characters of a word of the command line
DEEPEST = 64  # lists and groups inside one another, or values that are made of others
FILE = 1_000_000  # bytes
FILE_VALUES = 20_000  # of a file, those that an alias repeats counted each time
EXPANDED = 1_000_000  # characters and values of a configuration, once it is resolved
RESOLVED = 100  # about as long is what a resolver gives
KEYED = ("oc.select", "oc.deprecated", "oc.dict.keys", "oc.dict.values")  # these are given a key
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def word_problem(word: str) -> str | None:
    """Why a word of the command line is not even read."""
    if len(word) > WORD:
        return f" has {len(word):,} characters; allowed: {WORD:,}"
    depth = 0
    for letter in word:
        depth += (letter in "[{(") - (letter in "]})")
        if depth > DEEPEST:
            return f" opens more than {DEEPEST} brackets inside one another"
    return None


def yaml_problem(text: str) -> str | None:
    """Why a YAML text is not made into values.

    Raises:
        yaml.YAMLError: It is none.
    """
    known: dict[str, tuple[int, int]] = {}  # by anchor: values, depth
    inside: list[list[Any]] = [[None, 0, 0]]  # anchor, values, depth
    for event in yaml.parse(text, Loader=LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            inside.append([event.anchor, 1, 0])
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, values, depth = inside.pop()
            known[anchor] = values, depth + 1
            _add(inside[-1], *known[anchor])
        elif isinstance(event, yaml.ScalarEvent):
            known[str(event.anchor)] = 1, 0
            _add(inside[-1], 1, 0)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in known:
                return f"*{event.anchor} stands inside what it repeats, or repeats nothing"
            _add(inside[-1], *known[event.anchor])
        if inside[-1][1] > FILE_VALUES:
            return f"it holds more than {FILE_VALUES:,} values"
        if len(inside) + inside[-1][2] > DEEPEST:
            return f"it opens more than {DEEPEST} lists and groups inside one another"
    return None


def _add(collection: list[Any], values: int, depth: int) -> None:
    collection[1] += values
    collection[2] = max(collection[2], depth)


def expansion_issues(config: DictConfig) -> Iterator[ConfigIssue]:
    """Interpolations that lead back to themselves, or to more than memory holds.

    Nothing is resolved for this but keys of other interpolations.
    """
    raw = OmegaConf.to_container(config, resolve=False, enum_to_str=True)
    sizes = _Sizes(config, raw)
    try:
        sizes.of((), 0)
    except _TooMuch as found:
        yield ConfigIssue(".".join(found.path), found.problem)


class _TooMuch(Exception):  # noqa: N818
    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(problem)
        self.path, self.problem = path, problem


Path = tuple[str, ...]


@dataclass
class _Sizes:
    """How many characters and values are at a place, all interpolations replaced."""

    config: DictConfig
    raw: Any

    def __post_init__(self) -> None:
        self.known: dict[Path, int] = {}
        self.open: dict[Path, None] = {}

    def of(self, path: Path, chain: int) -> int:
        """Of what is there.

        Args:
            path: Its keys.
            chain: Through how many interpolations it was come to.
        """
        if path in self.known:
            return self.known[path]
        if path in self.open:
            raise _TooMuch(path, " is made of itself: its interpolations lead back to it")
        if chain > DEEPEST:
            raise _TooMuch(path, f" is made of others, these of others, more than {DEEPEST} times")
        self.open[path] = None
        self.known[path] = size = self._size(path, _at(self.raw, path), chain)
        del self.open[path]
        if size > EXPANDED:
            problem = f" would become more than {EXPANDED:,} characters and values"
            raise _TooMuch(path, f"{problem} by its interpolations")
        return size

    def _size(self, path: Path, value: Any, chain: int) -> int:
        if isinstance(value, (dict, list)):
            names = value if isinstance(value, dict) else range(len(value))
            return 1 + sum(self.of((*path, str(name)), chain) for name in names)
        if not isinstance(value, str) or "${" not in value:
            return 1 + len(value) if isinstance(value, str) else 1
        return len(value) + sum(self._of_one(path, one, chain) for one in interpolations(value))

    def _of_one(self, path: Path, inner: str, chain: int) -> int:
        resolver, colon, arguments = inner.partition(":")
        if colon and "${" not in resolver and resolver not in KEYED:
            return RESOLVED
        key = arguments.split(",")[0].strip(" '\"") if colon and resolver in KEYED else inner
        target = _target(path, self._written_out(key))
        return self.of(target, chain + 1) if _exists(self.raw, target) else 1

    def _written_out(self, key: str) -> str:
        """A key that is itself made by interpolations, whose sizes are known to be bearable."""
        if "${" not in key:
            return key
        try:
            tree = parse(key)
            return str(self.config.resolve_parse_tree(tree, node=self.config))
        except (OmegaConfBaseException, ValueError, TypeError):
            return key


def interpolations(text: str) -> Iterator[str]:
    """What stands between `${` and `}`, innermost first."""
    starts: list[int] = []
    for found in re.finditer(r"\$\{|\{|\}", text):
        if found[0] != "}":
            starts.append(found.end() if found[0] == "${" else -1)
        elif starts and (start := starts.pop()) >= 0:
            yield text[start : found.start()]


def _target(path: Path, key: str) -> Path:
    dots = len(key) - len(key.lstrip("."))
    names = [name for name in re.split(r"[.\[\]]+", key) if name]
    return (*path[: len(path) - dots], *names) if dots else tuple(names)


def _at(raw: Any, path: Path) -> Any:
    for name in path:
        if isinstance(raw, dict):
            raw = next((value for key, value in raw.items() if str(key) == name), None)
        else:
            raw = raw[int(name)] if isinstance(raw, list) and name.isdigit() else None
    return raw


def _exists(raw: Any, path: Path) -> bool:
    return _at(raw, path) is not None


DEPTH = 64  # of lists and dicts in one another
LENGTH = 2_000_000  # letters of a YAML text
LONGEST = 50_000  # letters of one of its values or keys
BITS = 64  # of an integer
KINDS = (str, int, float, bool, NoneType, list, dict)
VALUES = 100_000  # in a YAML text


def load_yaml(text: object, source: str, most: int = VALUES) -> Any:
    """The plain value of a YAML text, read as OmegaConf reads it.

    Args:
        text: What should be one.
        source: The file or key that it is from, for errors.
        most: Values in it, those of an alias counted each time that it is used.

    Raises:
        UserError: It is none, or far larger or deeper than any configuration.
    """
    if not isinstance(text, str):
        raise UserError(f"{source} is a {type(text).__name__}, not a YAML text")
    if len(text) > LENGTH:
        raise UserError(f"{source} has {len(text):,} letters; allowed: {LENGTH:,}")
    try:
        _check_events(text, most)
        return _plain(yaml.load(text, get_yaml_loader()))
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    # What is no date, or no number that Python takes, is a ValueError.
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{source} is not YAML: {reason[:200]}") from error


def _check_events(text: str, most: int) -> None:
    """Counts what the text will become, before it becomes that."""
    sizes: list[int] = [0]  # of what is open, from the outermost in
    names: list[str | None] = []  # their anchors
    anchored: dict[str, int] = {}
    for event in yaml.parse(text, yaml.SafeLoader):
        size = 0
        if isinstance(event, yaml.CollectionStartEvent):
            sizes.append(1)
            names.append(event.anchor)
        elif isinstance(event, yaml.CollectionEndEvent):
            size, name = sizes.pop(), names.pop()
            if name:
                anchored[name] = size
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
            if event.anchor:
                anchored[event.anchor] = size
            if len(event.value) > LONGEST:
                raise UserError(f"a text of {len(event.value):,} letters; allowed: {LONGEST:,}")
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in anchored or event.anchor in names:
                raise UserError("an alias that stands for nothing finished")
            size = anchored[event.anchor]
        sizes[-1] += size
        if len(sizes) > DEPTH:
            raise UserError(f"values nested more than {DEPTH} deep")
        if sum(sizes) > most:
            raise UserError(f"more than {most:,} values")


def load_json(text: object, source: str) -> Any:
    """The plain value of a JSON text.

    Args:
        text: What should be one.
        source: The file or key that it is from, for errors.

    Raises:
        UserError: It is none, or far deeper than any configuration or table.
    """
    if not isinstance(text, str):
        raise UserError(f"{source} is a {type(text).__name__}, not a JSON text")
    try:
        return _plain(json.loads(text))
    except RecursionError as error:
        raise UserError(f"{source}: values nested more than {DEPTH} deep") from error
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    except ValueError as error:
        raise UserError(f"{source} is not JSON: {error}") from error


def _plain(value: Any) -> Any:
    """The same, if it is what JSON has, and no deeper than others can follow."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEPTH:
            raise UserError(f"values nested more than {DEPTH} deep")
        for one in level:
            if type(one) not in KINDS:
                raise UserError(f"a value of type {type(one).__name__}")
            if type(one) is int and one.bit_length() > BITS:
                raise UserError(f"an integer of more than {BITS} bits")
        level = [part for outer in level for part in _parts(outer)]
    return value


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, list) else []
