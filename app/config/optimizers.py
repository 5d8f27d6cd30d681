"""Nodes of optimizers: their arguments, and the options of this program among them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from app.config.allowlist import PARTIAL, TARGET
from app.config.schema import Node, OptimizerOptions, ParameterGroup
from app.config.types import iter_issues, to_dataclass
from app.runtime.errors import ConfigIssue, join_choices

OPTIONS = tuple(field.name for field in fields(OptimizerOptions))
GROUP_OPTIONS = tuple(field.name for field in fields(ParameterGroup))
GROUP_RATES = ("base_lr", "max_lr", "min_lr", "swa_lr")
SELECTORS = tuple(name for name in GROUP_OPTIONS if name != "lr_scale")


def optimizer_nodes(node: Any) -> dict[str, Any]:
    """Return optimizers by key: `optimizer` itself, or `optimizer.<submodule of the model>`."""
    if not isinstance(node, dict) or TARGET in node:
        return {"optimizer": node}
    return {f"optimizer.{name}": child for name, child in node.items() if child is not None}


def optimizer_arguments(node: Node) -> Node:
    """Return the node without the options of this program."""
    return {name: value for name, value in node.items() if name not in OPTIONS}


def optimizer_options(node: Node) -> OptimizerOptions:
    """Return the options of this program in a valid node of an optimizer."""
    return to_dataclass(_own_options(node), OptimizerOptions)


def group_arguments(node: Node) -> dict[str, Node]:
    """Return what each group of an optimizer sets besides the options of this program."""
    return {
        name: {key: value for key, value in group.items() if key not in GROUP_OPTIONS}
        for name, group in _groups(node)
    }


def argument_nodes(key: str, node: Node) -> dict[str, Node]:
    """Return what can be checked of an optimizer and of each of its groups, by key."""
    own = {TARGET: node.get(TARGET), PARTIAL: True}
    groups = {f"{key}.groups.{name}": own | group for name, group in group_arguments(node).items()}
    return {key: optimizer_arguments(node), **groups}


def complete_nodes(key: str, node: Node) -> dict[str, Node]:
    """Return the optimizer at a key and one with the arguments of each of its groups, by key."""
    own = optimizer_arguments(node)
    return {key: own} | {
        f"{key}.groups.{name}": group if TARGET in group else own | group
        for name, group in group_arguments(node).items()
    }


def option_issues(key: str, node: Any) -> Iterator[ConfigIssue]:
    """Yield what is wrong with the options of this program in the node of an optimizer."""
    if not isinstance(node, dict):
        return
    yield from iter_issues(key, _own_options(node), OptimizerOptions)
    for name, group in _groups(node):
        where = f"{key}.groups.{name}"
        if not re.fullmatch(r"\w[\w.+=,@-]*", str(name)):
            yield ConfigIssue(where, " names a column; allowed: letters, digits, _.+=,@-")
        if not any(group.get(selector) not in (None, False) for selector in SELECTORS):
            yield ConfigIssue(
                where, f" selects nothing; it needs one of: {join_choices(SELECTORS)}"
            )


def per_group_rates(node: Any, scales: Sequence[float]) -> Any:
    """Return the node of a schedule with a learning rate for each parameter group.

    Args:
        node: Arguments of torch's schedules that are one rate for all groups become lists.
        scales: Factor of the rate for each group.
    """
    if not isinstance(node, dict):
        return node
    is_of_torch = str(node.get(TARGET)).startswith("torch.optim.")
    return {
        name: [value * scale for scale in scales]
        if is_of_torch and name in GROUP_RATES and isinstance(value, (int, float))
        else per_group_rates(value, scales)
        for name, value in node.items()
    }


def _own_options(node: Node) -> dict[str, Any]:
    """Return the values of `OptimizerOptions` in a node, and of `ParameterGroup` in its groups."""
    own = {name: node[name] for name in OPTIONS if name in node}
    if isinstance(own.get("groups"), dict):
        own["groups"] = {
            name: {key: value for key, value in group.items() if key in GROUP_OPTIONS}
            if isinstance(group, dict)
            else group
            for name, group in own["groups"].items()
        }
    return own


def _groups(node: Node) -> Iterator[tuple[str, Node]]:
    groups = node.get("groups")
    for name, group in groups.items() if isinstance(groups, dict) else ():
        if isinstance(group, dict):
            yield name, group
