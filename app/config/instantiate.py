"""Parts from their nodes: `{_target_: torch.optim.AdamW, lr: 0.1}` becomes the object.

In place of Hydra's `instantiate`: an allow-list, plain Python values, the node's key in errors.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_type_hints

from app.config.allowlist import PARTIAL, POSITIONAL, TARGET, TargetError, locate
from app.config.types import MISSING, UNKNOWN, alternatives, describe, matches_type
from app.runtime.errors import ConfigIssue, UserError, nearest, one_of


class Instantiator:
    """Builds nodes, trusting what the user trusts.

    Args:
        trusted: Modules outside this program that the user named himself.
    """

    def __init__(self, trusted: Sequence[str] = ()) -> None:
        self.trusted = trusted

    def __call__(self, key: str, node: Any, *given: Any, **offers: Any) -> Any:
        """The object that a node describes, its children built first.

        Args:
            key: The node's place in the configuration, for errors.
            node: A plain value; dicts with `_target_` become objects, at any depth.
            *given: First positional arguments that the program adds (parameters, an optimizer).
            **offers: Further arguments that the program has, passed on where the target has a
                parameter of that name, or takes any (`**kwargs`).

        Raises:
            UserError: The target cannot be found, or refuses its arguments.
        """
        if isinstance(node, list):
            return [self(f"{key}.{index}", item) for index, item in enumerate(node)]
        if not isinstance(node, dict):
            return node
        children = {
            name: self(f"{key}.{name}", child) for name, child in node.items() if name != TARGET
        }
        return (
            self._call(key, node[TARGET], children, given, offers) if TARGET in node else children
        )

    def _call(
        self, key: str, name: str, children: dict[str, Any], given: Any, offers: dict[str, Any]
    ) -> Any:
        try:
            target = locate(name, self.trusted)
        except TargetError as error:
            raise UserError(f"{key}._target_={error}") from error
        positional = [*given, *children.pop(POSITIONAL, [])]
        wanted = parameters(target)
        passes_on = any(one.kind is one.VAR_KEYWORD for one in wanted.values())
        arguments = children | {k: v for k, v in offers.items() if k in wanted or passes_on}
        if arguments.pop(PARTIAL, False):
            return functools.partial(target, *positional, **arguments)
        try:
            return target(*positional, **arguments)
        except UserError as error:
            raise UserError(f"{key}: {error}") from error
        except (TypeError, ValueError, RuntimeError, OSError) as error:
            raise UserError(f"{key}: {name} refused its arguments: {error}") from error

    def named(self, key: str, nodes: dict[str, Any], **offers: Any) -> dict[str, Any]:
        """The objects of a dict of named nodes; a null node is left out."""
        return {name: self(f"{key}.{name}", node, **offers) for name, node in nodes.items() if node}


def parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The named parameters of a class or function; empty where Python cannot tell."""
    try:
        return dict(inspect.signature(target, eval_str=False).parameters)
    except ValueError:
        return {}


def iter_node_issues(
    key: str, node: object, trusted: Sequence[str], given: int = 0, offers: Sequence[str] = ()
) -> Iterator[ConfigIssue]:
    """What is wrong with the targets at or below `key`, and with their arguments.

    Args:
        key: The node's place in the configuration.
        node: A plain value.
        trusted: Modules that the user named himself.
        given: How many first positional arguments the program adds.
        offers: Names of further arguments that the program has.
    """
    if isinstance(node, list):
        for index, item in enumerate(node):
            yield from iter_node_issues(f"{key}.{index}", item, trusted)
    if not isinstance(node, dict):
        return
    for name, child in node.items():
        yield from iter_node_issues(f"{key}.{name}", child, trusted)
    if TARGET not in node:
        return
    if not isinstance(node.get(POSITIONAL, []), list):
        yield ConfigIssue(f"{key}.{POSITIONAL}", f"={node[POSITIONAL]!r} is no list of arguments")
        return
    try:
        target = locate(node[TARGET], trusted)
    except TargetError as error:
        yield ConfigIssue(f"{key}.{TARGET}", f"={error}")
        return
    yield from _argument_issues(key, node, target, given, offers)


def _argument_issues(
    key: str, node: dict[str, Any], target: Callable[..., Any], given: int, offers: Sequence[str]
) -> Iterator[ConfigIssue]:
    named = {k: v for k, v in node.items() if k not in (TARGET, PARTIAL, POSITIONAL)}
    wanted = parameters(target)
    kinds = {parameter.kind for parameter in wanted.values()}
    taken = list(wanted)[: given + len(node.get(POSITIONAL, []))]
    open_ = {k: p for k, p in wanted.items() if k not in taken and p.kind not in _VARIADIC}
    if wanted and inspect.Parameter.VAR_KEYWORD not in kinds:
        for name in named.keys() - open_.keys():
            close = nearest(name, open_)
            yield ConfigIssue(
                f"{key}.{name}",
                f"={named[name]!r} is not an argument of {node[TARGET]}; "
                f"it takes: {one_of(open_)}{close}",
            )
    for name, parameter in open_.items():
        if name in named and name in offers:
            yield ConfigIssue(
                f"{key}.{name}", f"={named[name]!r} is not yours to give: the run sets it"
            )
        elif name in named:
            yield from _value_issues(f"{key}.{name}", named[name], target, parameter)
        elif parameter.default is parameter.empty and name not in offers and PARTIAL not in node:
            yield ConfigIssue(f"{key}.{name}", f" is missing: {node[TARGET]} cannot do without it")


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _value_issues(
    key: str, value: object, target: Callable[..., Any], parameter: inspect.Parameter
) -> Iterator[ConfigIssue]:
    """A plain number, text or null where the signature clearly wants another kind."""
    expected = _annotation(target, parameter)
    if value == UNKNOWN:
        return
    if value == MISSING:
        yield ConfigIssue(key, f" has no value; give one, as {key}=... on the command line")
    elif (
        isinstance(value, (str, int, float))
        and _is_plain(expected)
        and not matches_type(value, expected)
    ):
        yield ConfigIssue(key, f"={value!r} does not fit; allowed: {_plainly(expected)}")


def _annotation(target: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    owner = target.__init__ if inspect.isclass(target) else target
    try:
        return get_type_hints(owner).get(parameter.name, parameter.empty)
    except (NameError, TypeError, AttributeError):  # names that only a type checker can resolve
        return parameter.empty


def _plainly(expected: Any) -> str:
    """The type in words, less the tensors that no configuration can hold."""
    kinds = [kind for kind in alternatives(expected) if getattr(kind, "__name__", "") != "Tensor"]
    return ", or ".join(describe(kind) for kind in kinds)


def _is_plain(expected: Any) -> bool:
    """Whether numbers, texts, booleans or null are wanted, with at most tensors beside them."""
    names = {getattr(alternative, "__name__", "") for alternative in alternatives(expected)}
    plain = {"int", "float", "bool", "str", "NoneType"}
    return bool(plain & names) and names <= plain | {"Tensor"}
