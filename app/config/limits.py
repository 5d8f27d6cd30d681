"""Limits on the size and depth of configurations, so that none can exhaust memory or time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import yaml
from omegaconf import Container, Node
from omegaconf.errors import InterpolationResolutionError
from omegaconf.grammar_visitor import GrammarVisitor
from omegaconf.resolvers import oc

from app.config.nested import KeyPath, dotted
from app.config.resolvers import replaced_resolver
from app.runtime.errors import ConfigError, ConfigIssue
from app.runtime.small_files import MAX_NESTING

MAX_INTERPOLATION_DEPTH = 16  # levels of interpolations of interpolations
MAX_OVERRIDE_LENGTH = 10_000  # characters of one override
MAX_FILE_BYTES = 1_000_000  # of a configuration file
MAX_FILE_VALUES = 20_000  # in a configuration file; aliases count each time they are used
CHARACTERS_PER_VALUE = 2  # of texts with interpolations, which OmegaConf parses slowly
MAX_RESOLVED_SIZE = 1_000_000  # characters of a resolved configuration; other costs are in these:
VALUE_COST = 40  # of a value: OmegaConf makes an object of each
INTERPOLATION_COST = 250  # of resolving `${...}`, in addition to its result
PARSE_COST = 25  # of each character inside `${...}`
TEXT_COST = 5  # of each character of a text with interpolations
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
            parsed = len(event.value) if "${" in event.value else 0
            anchors[str(event.anchor)] = 1 + parsed // CHARACTERS_PER_VALUE, 0
            _add(stack[-1], *anchors[str(event.anchor)])
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


class LimitError(InterpolationResolutionError):
    """An interpolation costs more than a configuration may."""


@dataclass
class _Budget:
    """What a resolution may still cost, in characters, and how deep it is nested now."""

    left: int = MAX_RESOLVED_SIZE
    depth: int = 0


_budget: ContextVar[_Budget | None] = ContextVar("_budget", default=None)
_visit_unlimited = GrammarVisitor.visitInterpolation


@contextmanager
def limited_interpolations() -> Iterator[None]:
    """Limit what each interpolation may cost, whoever resolves it, while the context is open.

    Inside `resolution_budget`, all interpolations together have one budget. Any other, such as one
    that Hydra resolves when a job starts, has its own.
    """
    if GrammarVisitor.visitInterpolation is _visit_limited:
        yield
        return
    setattr(GrammarVisitor, "visitInterpolation", _visit_limited)  # noqa: B010 - for mypy
    try:
        with replaced_resolver("oc.decode", _decode_limited):
            yield
    finally:
        setattr(GrammarVisitor, "visitInterpolation", _visit_unlimited)  # noqa: B010


@contextmanager
def resolution_budget() -> Iterator[None]:
    """Give one budget to everything that is resolved while the context is open.

    Raises:
        ConfigError: It is spent, or interpolations are nested too deep.
    """
    token = _budget.set(_Budget())
    try:
        with limited_interpolations():
            yield
    except RecursionError as error:  # of the parser of interpolations
        problem = " nests values too deep"
        raise ConfigError([ConfigIssue("the configuration", problem)]) from error
    except Exception as error:
        limit = _limit_error_in(error)
        if limit is None:
            raise
        problem = f" {str(limit).splitlines()[0]}"
        raise ConfigError([ConfigIssue(limit.full_key or "the configuration", problem)]) from error
    finally:
        _budget.reset(token)


def _limit_error_in(error: BaseException | None) -> LimitError | None:
    """Return the `LimitError` that Hydra or OmegaConf has turned into another error, if any."""
    while error is not None and not isinstance(error, LimitError):
        error = error.__cause__ or error.__context__
    return error


def charge(cost: int, path: KeyPath = ()) -> None:
    """Take a cost from the current budget.

    Args:
        cost: In characters.
        path: Key that is being resolved, for errors; OmegaConf adds it to errors of interpolations.

    Raises:
        LimitError: The budget is spent.
    """
    budget = _budget.get()
    assert budget is not None
    budget.left -= cost
    if budget.left < 0:
        raise _limit_error(f"would expand to more than {MAX_RESOLVED_SIZE:,} characters", path)


def charge_value(value: Any, path: KeyPath) -> None:
    """Take the cost of a resolved value, without what it contains, from the current budget.

    Raises:
        LimitError: The budget is spent, or the value is nested too deep.
    """
    if len(path) > MAX_NESTING:
        raise _limit_error(f"is nested more than {MAX_NESTING} deep", path)
    charge(VALUE_COST + (len(value) if isinstance(value, str) else 0), path)


def charge_text(value: Any, path: KeyPath) -> None:
    """Take the cost of a value that OmegaConf has yet to parse from the current budget.

    Raises:
        LimitError: The budget is spent, or the value is nested too deep.
    """
    charge_value(value, path)
    if isinstance(value, str) and "${" in value:
        charge(TEXT_COST * len(value), path)


def _limit_error(problem: str, path: KeyPath) -> LimitError:
    error = LimitError(f"{problem} through its interpolations")
    error.full_key = dotted(path)
    return error


def _visit_limited(visitor: GrammarVisitor, context: Any) -> Any:
    """Resolve one `${...}`, at any level of nesting."""
    budget = _budget.get() or _Budget()
    token = _budget.set(budget)
    budget.depth += 1
    try:
        if budget.depth > MAX_INTERPOLATION_DEPTH:
            raise _limit_error(f"is nested more than {MAX_INTERPOLATION_DEPTH} deep", ())
        charge(INTERPOLATION_COST + PARSE_COST * (context.stop.stop - context.start.start))
        value = _visit_unlimited(visitor, context)
        charge(_size(value))
        return value
    finally:
        budget.depth -= 1
        _budget.reset(token)


def _decode_limited(expr: str | None, _parent_: Container, _node_: Node) -> Any:
    """Call the resolver `oc.decode`, whose parser is slow."""
    charge(PARSE_COST * len(expr) if isinstance(expr, str) else 0)
    return oc.decode(expr, _parent_, _node_)


def _size(value: Any) -> int:
    """Return the cost of a value and all that it contains."""
    if isinstance(value, Node):
        value = value._value()
    if isinstance(value, dict):
        return VALUE_COST + sum(_size(child) for child in value.values())
    if isinstance(value, list):
        return VALUE_COST + sum(map(_size, value))
    return VALUE_COST + (len(value) if isinstance(value, str) else 0)


def interpolations(text: str) -> Iterator[str]:
    """Yield the text between each `${` and its `}`, innermost first."""
    starts: list[int] = []
    for match in re.finditer(r"\$\{|\{|\}", text):
        if match[0] != "}":
            starts.append(match.end() if match[0] == "${" else -1)
        elif starts and (start := starts.pop()) >= 0:
            yield text[start : match.start()]
