"""Build objects from nodes such as `{_target_: torch.optim.AdamW, lr: 0.1}`.

Differs from Hydra's `instantiate` by its allow-list, plain Python values as arguments, and the
key of the node in every error.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from app.config.allowlist import (
    PARTIAL,
    POSITIONAL,
    TARGET,
    TargetError,
    is_allowed,
    is_trusted,
    locate,
    signature_parameters,
    trust_hint,
)
from app.config.nested import iter_children, iter_leaves
from app.config.types import MISSING, TYPE_NAMES, UNKNOWN
from app.runtime.errors import ConfigIssue, UserError, did_you_mean, join_choices

PLAIN_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean", NoneType: "null"}
PART_NAME_PROBLEM = ": {!r} cannot name a part; allowed: letters, digits, _ and -"
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class Instantiator:
    """Builds objects from nodes.

    Args:
        trusted: Modules outside this program that the user trusts by name.
    """

    def __init__(self, trusted: Sequence[str] = ()) -> None:
        self.trusted = trusted

    def __call__(self, key: str, node: Any, *positional: Any, **injected: Any) -> Any:
        """Build the object that a node describes, its children first.

        Args:
            key: Key of the node in the configuration, for errors.
            node: Plain value; dicts with `_target_` become objects, at any depth.
            *positional: First positional arguments (parameters, an optimizer).
            **injected: Further arguments, passed on if the target has a parameter of that name or
                takes any (`**kwargs`); a part of the node receives those that it requires.

        Raises:
            UserError: The target cannot be found, or refuses its arguments.
        """
        return self._build(key, node, positional, injected, {})

    def _build(
        self,
        key: str,
        node: Any,
        positional: Any,
        injected: dict[str, Any],
        offered: dict[str, Any],
    ) -> Any:
        below = offered | injected
        if isinstance(node, list):
            return [self._build(f"{key}.{i}", item, (), {}, below) for i, item in enumerate(node)]
        if not isinstance(node, dict):
            return node
        children = {
            name: self._build(f"{key}.{name}", child, (), {}, below)
            for name, child in node.items()
            if name != TARGET
        }
        if TARGET not in node:
            return children
        return self._call(key, node[TARGET], children, positional, injected, offered)

    def _call(
        self,
        key: str,
        name: str,
        children: dict[str, Any],
        positional: Any,
        injected: dict[str, Any],
        offered: dict[str, Any],
    ) -> Any:
        try:
            target = locate(name, self.trusted)
        except TargetError as error:
            raise UserError(f"{key}._target_={error}") from error
        positional = [*positional, *children.pop(POSITIONAL, [])]
        accepted = signature_parameters(target)
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
        required = {k: v for k, v in offered.items() if k in accepted and is_required(accepted[k])}
        passed = {k: v for k, v in injected.items() if k in accepted or takes_any}
        arguments = required | children | passed
        arguments = {k: _as_tensor(v, target, accepted.get(k)) for k, v in arguments.items()}
        if arguments.pop(PARTIAL, False):
            return functools.partial(target, *positional, **arguments)
        try:
            built = target(*positional, **arguments)
        except UserError as error:
            raise UserError(f"{key}: {error}") from error
        except (TypeError, ValueError, RuntimeError, OSError) as error:
            raise UserError(f"{key}: {name} could not be built: {error}") from error
        if not is_trusted(name, self.trusted):
            check_part_names(key, built)
        return built

    def build_all(self, key: str, nodes: dict[str, Any], **injected: Any) -> dict[str, Any]:
        """Build a dict of nodes to a dict of objects, leaving out nodes that are null."""
        return {
            name: self(f"{key}.{name}", node, **injected) for name, node in nodes.items() if node
        }


def is_required(parameter: inspect.Parameter) -> bool:
    """Return whether a parameter has no default."""
    return parameter.default is parameter.empty and parameter.kind not in _VARIADIC


def _as_tensor(value: Any, target: Callable[..., Any], parameter: inspect.Parameter | None) -> Any:
    """Return a list of numbers as a float32 tensor if the parameter is annotated as a tensor."""
    if parameter is None or not _is_numbers(value) or not _takes_tensor(target, parameter):
        return value
    import torch

    return torch.tensor(value, dtype=torch.float32)


def _is_numbers(value: object) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(type(item) in (int, float) for item in value)


def _takes_tensor(target: Callable[..., Any], parameter: inspect.Parameter) -> bool:
    return any(map(_is_tensor, _annotated_types(target, parameter)))


def check_part_names(key: str, built: object) -> None:
    """Check the names of the parts of a module, which `torch.export` writes into code that it runs.

    Raises:
        UserError: A name is not plain; the message names it.
    """
    named_modules = getattr(built, "named_modules", dict)
    for path, _ in named_modules():
        for name in path.split(".") if path else ():
            if not is_part_name(name):
                raise UserError(f"{key}{PART_NAME_PROBLEM.format(name)}")


def is_part_name(name: object) -> bool:
    """Return whether a name, such as a key of a `ModuleDict`, is harmless in generated code."""
    return bool(re.fullmatch(r"[\w-]+", str(name)))


def iter_node_issues(
    key: str,
    node: object,
    trusted: Sequence[str],
    num_positional: int = 0,
    injected: Sequence[str] = (),
    offered: Sequence[str] = (),
) -> Iterator[ConfigIssue]:
    """Yield everything wrong with the targets at or below `key`, and with their arguments.

    Args:
        key: Key of the node in the configuration.
        node: Plain value.
        trusted: Modules that the user trusts by name.
        num_positional: Number of first positional arguments that the program adds.
        injected: Names of further arguments that the program passes.
        offered: Names of arguments that it passes to a part that requires them.
    """
    for name, child in iter_children(node):
        below = (*injected, *offered)
        yield from iter_node_issues(f"{key}.{name}", child, trusted, offered=below)
        if not is_part_name(name) and any(TARGET in path for path, _ in iter_leaves(child)):
            yield ConfigIssue(key, PART_NAME_PROBLEM.format(name))
    if not isinstance(node, dict) or TARGET not in node:
        return
    if not isinstance(node.get(POSITIONAL, []), list):
        problem = f"={node[POSITIONAL]!r} is not a list of arguments"
        yield ConfigIssue(f"{key}.{POSITIONAL}", problem)
        return
    try:
        target = locate(node[TARGET], trusted)
    except TargetError as error:
        yield ConfigIssue(f"{key}.{TARGET}", f"={error}")
        if not is_allowed(node[TARGET], trusted):
            yield ConfigIssue("", trust_hint([str(node[TARGET])]))
        return
    yield from _argument_issues(key, node, target, num_positional, injected, offered)


def _argument_issues(
    key: str,
    node: dict[str, Any],
    target: Callable[..., Any],
    num_positional: int,
    injected: Sequence[str],
    offered: Sequence[str],
) -> Iterator[ConfigIssue]:
    arguments = {k: v for k, v in node.items() if k not in (TARGET, PARTIAL, POSITIONAL)}
    accepted = signature_parameters(target)
    kinds = {parameter.kind for parameter in accepted.values()}
    filled = list(accepted)[: num_positional + len(node.get(POSITIONAL, []))]
    by_name = {k: p for k, p in accepted.items() if k not in filled and p.kind not in _VARIADIC}
    if accepted and inspect.Parameter.VAR_KEYWORD not in kinds:
        for name in arguments.keys() - by_name.keys():
            close = did_you_mean(name, by_name)
            yield ConfigIssue(
                f"{key}.{name}",
                f"={arguments[name]!r} is not an argument of {node[TARGET]}; "
                f"it takes: {join_choices(by_name)}{close}",
            )
    for name, parameter in by_name.items():
        if name in arguments and name in injected:
            problem = f"={arguments[name]!r} cannot be set: the program passes this argument"
            yield ConfigIssue(f"{key}.{name}", problem)
        elif name in arguments:
            yield from _value_issues(f"{key}.{name}", arguments[name], target, parameter)
        elif is_required(parameter) and name not in (*injected, *offered) and PARTIAL not in node:
            yield ConfigIssue(f"{key}.{name}", f" is missing: {node[TARGET]} requires it")


def _value_issues(
    key: str, value: object, target: Callable[..., Any], parameter: inspect.Parameter
) -> Iterator[ConfigIssue]:
    """Check a number or string against a parameter that is annotated with another plain type."""
    types = _annotated_types(target, parameter)
    allowed = [type_ for type_ in types if not _is_tensor(type_)]
    is_checked = type(value) in (str, int, float, bool) and value not in (MISSING, UNKNOWN)
    if not is_checked or not allowed or any(type_ not in [*PLAIN_TYPES] for type_ in allowed):
        return
    if type(value) not in allowed and not (type(value) is int and float in allowed):
        names = ", or ".join(TYPE_NAMES[PLAIN_TYPES[type_]] for type_ in allowed)
        yield ConfigIssue(key, f"={value!r} is not valid; allowed: {names}")


def _is_tensor(type_: Any) -> bool:
    return getattr(type_, "__name__", "") == "Tensor"  # which no configuration contains


def _annotated_types(target: Callable[..., Any], parameter: inspect.Parameter) -> tuple[Any, ...]:
    annotation = _annotation(target, parameter)
    is_union = get_origin(annotation) in (Union, UnionType)
    return get_args(annotation) if is_union else (annotation,)


def _annotation(target: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    function = target.__init__ if inspect.isclass(target) else target
    try:
        return get_type_hints(function).get(parameter.name, parameter.empty)
    except (NameError, TypeError, AttributeError):  # names that only a type checker can resolve
        return parameter.empty
