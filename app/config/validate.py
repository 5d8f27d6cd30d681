"""Validate the complete configuration before anything starts, and report all errors at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from app.config.instantiate import Instantiator, iter_node_issues
from app.config.rules import rule_issues
from app.config.schema import AUTO, STAGES, Config
from app.config.types import UNKNOWN, iter_issues, to_dataclass
from app.runtime.errors import ConfigError, ConfigIssue, UserError

INJECTED_ARGUMENTS = {  # passed to components that have a parameter of that name
    "callbacks": ("folder", "model", "config"),
    "task": ("model", "loss", "metrics", "precision"),
    "average": ("model",),
}


def validate(
    plain: dict[str, Any], trusted: Sequence[str], known_issues: Sequence[ConfigIssue] = ()
) -> Config:
    """Validate a configuration and return it typed.

    Args:
        plain: Resolved configuration, see `app.config.resolve.resolve`.
        trusted: Modules outside this program that the user trusts by name.
        known_issues: Issues found before, to be reported together with the others.

    Raises:
        ConfigError: Lists everything that is wrong.
    """
    issues = [*known_issues, *iter_issues("", plain, Config)]
    issues += rule_issues(plain, tuple(issue.key for issue in issues))
    issues += _target_issues(plain, trusted)
    invalid_keys = {issue.key for issue in issues}
    issues += _build_issues(plain, trusted, invalid_keys)
    if issues:
        raise ConfigError(issues)
    return to_dataclass(plain, Config)


def _target_issues(plain: dict[str, Any], trusted: Sequence[str]) -> Iterator[ConfigIssue]:
    for key, node, num_positional in _iter_nodes(plain):
        if "_target_" not in node:
            yield ConfigIssue(f"{key}._target_", " is missing: the class or function to use")
        injected = INJECTED_ARGUMENTS.get(key.partition(".")[0], ())
        yield from iter_node_issues(key, node, trusted, num_positional, injected)


def _build_issues(
    plain: dict[str, Any], trusted: Sequence[str], invalid_keys: set[str]
) -> Iterator[ConfigIssue]:
    """Build the small components once, so that errors of their constructors are reported too."""
    nodes = {
        key: node
        for key, node, _ in _iter_nodes(plain)
        if not any(bad.startswith(key) for bad in invalid_keys) and UNKNOWN not in node.values()
    }
    instantiate = Instantiator(trusted)
    for key, node in nodes.items():
        if key.startswith(("metric.", "loss.", "data.augment.")):
            strict = {"validate_args": True} if "validate_args" in node else {}
            _, issues = _try_build(instantiate, key, node | strict)
            yield from issues
    if "average" in nodes:
        import torch

        _, issues = _try_build(instantiate, "average", nodes["average"], torch.nn.Linear(1, 1))
        yield from issues
    for key, node in nodes.items():
        if key == "optimizer" or key.startswith("optimizer."):
            import torch

            parameters = [torch.nn.Parameter(torch.zeros(1))]
            optimizer, issues = _try_build(instantiate, key, node, parameters)
            yield from issues
            scheduler = "scheduler.lr_scheduler"
            if scheduler in nodes and not issues:
                _, issues = _try_build(instantiate, scheduler, nodes[scheduler], optimizer)
                yield from issues


def _try_build(
    instantiate: Instantiator, key: str, node: Any, *positional: Any
) -> tuple[Any, list[ConfigIssue]]:
    try:
        return instantiate(key, node, *positional), []
    except UserError as error:
        return None, [ConfigIssue("", str(error))]


def _iter_nodes(plain: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], int]]:
    """Yield (key, node, number of positional arguments that the program adds) of components."""
    scheduler, data = _group(plain, "scheduler"), _group(plain, "data")
    single = {key: plain.get(key) for key in ("model", "task", "average")}
    single["scheduler.lr_scheduler"] = fill_auto(scheduler.get("lr_scheduler"), 100)
    single["data.sampling"] = data.get("sampling")
    optimizers = optimizer_nodes(plain.get("optimizer"))
    num_positional = {"scheduler.lr_scheduler": 1} | dict.fromkeys(optimizers, 1)
    groups = {
        "loss": plain.get("loss"),
        "callbacks": plain.get("callbacks"),
        "data.source": data.get("source"),
        "data.augment": data.get("augment"),
        **{f"metric.{stage}": _group(plain, "metric").get(stage) for stage in STAGES},
    }
    grouped = {
        f"{key}.{name}": node
        for key, nodes in groups.items()
        if isinstance(nodes, dict)
        for name, node in nodes.items()
    }
    for key, node in (single | optimizers | grouped).items():
        if isinstance(node, dict):
            yield key, node, num_positional.get(key, 0)


def _group(plain: dict[str, Any], name: str) -> dict[str, Any]:
    value = plain.get(name)
    return value if isinstance(value, dict) else {}


def optimizer_nodes(node: Any) -> dict[str, Any]:
    """Return optimizers by key: `optimizer` itself, or `optimizer.<submodule of the model>`."""
    if not isinstance(node, dict) or "_target_" in node:
        return {"optimizer": node}
    return {f"optimizer.{name}": child for name, child in node.items() if child is not None}


def fill_auto(node: Any, length: int) -> Any:
    """Replace every argument `auto` of a scheduler, at any depth, by the length of the run."""
    if isinstance(node, dict):
        return {key: fill_auto(value, length) for key, value in node.items()}
    return length if node == AUTO else node


def has_auto(node: Any) -> bool:
    """Return whether any argument is `auto`."""
    return bool(fill_auto(node, 0) != node)
