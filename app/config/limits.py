"""Limits on the size and depth of configurations, so that none can exhaust memory or time.

A configuration may take `MAX_SIZE` characters: as a file, and again as what it resolves to. What
is slow counts as more characters than it has.
"""

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
MAX_SIZE = 1_000_000  # characters, where:
VALUE_COST = 40  # a value takes as many more, since OmegaConf makes an object of each
PARSE_COST = 25  # each character of a text with interpolations, or inside one, takes as many
INTERPOLATION_COST = 250  # resolving `${...}` takes as many, in addition to its result
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
    anchors: dict[str, tuple[int, int]] = {}  # name -> size, depth
    stack: list[list[Any]] = [[None, 0, 0]]  # anchor, size, depth
    for event in yaml.parse(text, Loader=YAML_LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            stack.append([event.anchor, VALUE_COST, 0])
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size, depth = stack.pop()
            anchors[anchor] = size, depth + 1
            _add(stack[-1], *anchors[anchor])
        elif isinstance(event, yaml.ScalarEvent):
            anchors[str(event.anchor)] = text_cost(event.value), 0
            _add(stack[-1], *anchors[str(event.anchor)])
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in anchors:
                return f"the alias *{event.anchor} refers to itself or to an unknown anchor"
            _add(stack[-1], *anchors[event.anchor])
        if stack[-1][1] > MAX_SIZE:
            return f"its values take more than {MAX_SIZE:,} characters"
        if len(stack) + stack[-1][2] > MAX_NESTING:
            return f"it nests lists and groups more than {MAX_NESTING} deep"
    return None


def _add(collection: list[Any], size: int, depth: int) -> None:
    collection[1] += size
    collection[2] = max(collection[2], depth)


class LimitError(InterpolationResolutionError):
    """A value costs more than a configuration may."""


@dataclass
class _Budget:
    """What a resolution may still cost, in characters, and where it is."""

    left: int = MAX_SIZE
    depth: int = 0  # of interpolations
    path: KeyPath = ()


_budget: ContextVar[_Budget | None] = ContextVar("_budget", default=None)
_visit_unlimited = GrammarVisitor.visitInterpolation


@contextmanager
def limited_interpolations() -> Iterator[None]:
    """Limit what each interpolation may cost, whoever resolves it, while the context is open.

    Inside `resolution_budget`, all interpolations together have one budget. Any other, such as one
    that Hydra resolves when a job starts, has its own.
    """
    visit = GrammarVisitor.visitInterpolation
    setattr(GrammarVisitor, "visitInterpolation", _visit_limited)  # noqa: B010 - for mypy
    try:
        with replaced_resolver("oc.decode", _decode_limited):
            yield
    finally:
        setattr(GrammarVisitor, "visitInterpolation", visit)  # noqa: B010


@contextmanager
def resolution_budget() -> Iterator[None]:
    """Give one budget to everything that is resolved while the context is open.

    Raises:
        ConfigError: It is spent, or values or interpolations are nested too deep.
    """
    budget = _Budget()
    token = _budget.set(budget)
    try:
        with limited_interpolations():
            yield
    except Exception as error:
        problem = _limit_problem(error)
        if problem is None:
            raise
        key = dotted(budget.path) or "the configuration"
        raise ConfigError([ConfigIssue(key, f" {problem}")]) from error
    finally:
        _budget.reset(token)


def _limit_problem(error: BaseException | None) -> str | None:
    """Return the limit that an error is about, which Hydra or OmegaConf may have wrapped."""
    if isinstance(error, LimitError):
        return str(error).splitlines()[0]
    if isinstance(error, RecursionError):  # of the parser of interpolations
        return "nests values too deep"
    return None if error is None else _limit_problem(error.__cause__ or error.__context__)


def current_path() -> KeyPath:
    """Return the key that is being resolved, as far as `enter_value` was told."""
    budget = _budget.get()
    return budget.path if budget else ()


def enter_value(path: KeyPath) -> None:
    """Begin to resolve a value.

    Raises:
        LimitError: It is nested too deep.
    """
    budget = _budget.get()
    assert budget is not None
    budget.path = path
    if len(path) > MAX_NESTING:
        raise LimitError(f"is nested more than {MAX_NESTING} deep through its interpolations")


def charge(cost: int) -> None:
    """Take a cost, in characters, from the current budget.

    Raises:
        LimitError: The budget is spent.
    """
    budget = _budget.get()
    assert budget is not None
    budget.left -= cost
    if budget.left < 0:
        problem = f"would expand to more than {MAX_SIZE:,} characters through its interpolations"
        raise LimitError(problem)


def text_cost(value: Any) -> int:
    """Return the cost of a value, without what it contains; a text may have yet to be parsed."""
    length = len(value) if isinstance(value, str) else 0
    is_parsed = isinstance(value, str) and "${" in value
    return VALUE_COST + length * (PARSE_COST if is_parsed else 1)


def _visit_limited(visitor: GrammarVisitor, context: Any) -> Any:
    """Resolve one `${...}`, at any level of nesting."""
    budget = _budget.get() or _Budget()
    token = _budget.set(budget)
    budget.depth += 1
    try:
        if budget.depth > MAX_INTERPOLATION_DEPTH:
            problem = f"is nested more than {MAX_INTERPOLATION_DEPTH} deep"
            raise LimitError(f"{problem} through its interpolations")
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
    children = value.values() if isinstance(value, dict) else value
    inner = sum(map(_size, children)) if isinstance(value, (dict, list)) else 0
    return VALUE_COST + inner + (len(value) if isinstance(value, str) else 0)
