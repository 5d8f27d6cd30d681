"""One look at the whole configuration before anything starts: all mistakes at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from app.config.instantiate import Instantiator, iter_node_issues
from app.config.rules import STAGES, rule_issues
from app.config.schema import Config
from app.config.types import UNKNOWN, iter_issues, to_dataclass
from app.runtime.errors import ConfigError, ConfigIssue, UserError

OFFERS = {  # what the program gives to a part that has a parameter of that name
    "callbacks": ("folder", "model", "config"),
    "task": ("model", "loss", "metrics", "precision"),
    "average": ("model",),
}
AUTO = "auto"  # in a scheduler's arguments: as many steps or epochs as the run has


def validate(
    plain: dict[str, Any], trusted: Sequence[str], found: Sequence[ConfigIssue] = ()
) -> Config:
    """The configuration, typed.

    Args:
        plain: Resolved, as `freeze` gives it.
        trusted: Modules outside this program that the user named himself.
        found: Mistakes known already.

    Raises:
        ConfigError: Everything that is wrong with it.
    """
    mistakes = [*found, *iter_issues("", plain, Config)]
    mistakes += rule_issues(plain, tuple(mistake.key for mistake in mistakes))
    mistakes += _target_mistakes(plain, trusted)
    wrong = {mistake.key for mistake in mistakes}
    mistakes += _trial_mistakes(plain, trusted, wrong)
    if mistakes:
        raise ConfigError(mistakes)
    return to_dataclass(plain, Config)


def fill_auto(node: Any, number: int) -> Any:
    """The node with every argument that is `auto`, at any depth, set to the number."""
    if isinstance(node, dict):
        return {key: fill_auto(value, number) for key, value in node.items()}
    return number if node == AUTO else node


def has_auto(node: Any) -> bool:
    """Whether an argument is `auto`."""
    return bool(fill_auto(node, 0) != node)


def _named_nodes(plain: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], int]]:
    """(key, node, first arguments that the program adds) of every part."""
    scheduler, data = _group(plain, "scheduler"), _group(plain, "data")
    single = {key: plain.get(key) for key in ("model", "task", "average")}
    single["scheduler.lr_scheduler"] = fill_auto(scheduler.get("lr_scheduler"), 100)
    single["data.sampling"] = data.get("sampling")
    optimizers = optimizer_nodes(plain.get("optimizer"))
    given = {"scheduler.lr_scheduler": 1} | dict.fromkeys(optimizers, 1)
    groups = {
        "loss": plain.get("loss"),
        "callbacks": plain.get("callbacks"),
        "data.source": data.get("source"),
        "data.augment": data.get("augment"),
        **{f"metric.{stage}": _group(plain, "metric").get(stage) for stage in STAGES},
    }
    named = {
        f"{key}.{name}": node
        for key, nodes in groups.items()
        if isinstance(nodes, dict)
        for name, node in nodes.items()
    }
    for key, node in (single | optimizers | named).items():
        if isinstance(node, dict):
            yield key, node, given.get(key, 0)


def optimizer_nodes(node: Any) -> dict[str, Any]:
    """By key each optimizer: `optimizer` itself, or `optimizer.<part of the model>`."""
    if not isinstance(node, dict) or "_target_" in node:
        return {"optimizer": node}
    return {f"optimizer.{name}": part for name, part in node.items() if part is not None}


def _group(plain: dict[str, Any], name: str) -> dict[str, Any]:
    value = plain.get(name)
    return value if isinstance(value, dict) else {}


def _target_mistakes(plain: dict[str, Any], trusted: Sequence[str]) -> Iterator[ConfigIssue]:
    for key, node, given in _named_nodes(plain):
        if "_target_" not in node:
            yield ConfigIssue(f"{key}._target_", " is missing: the class or function to use")
        offers = OFFERS.get(key.partition(".")[0], ())
        yield from iter_node_issues(key, node, trusted, given, offers)


def _trial_mistakes(
    plain: dict[str, Any], trusted: Sequence[str], wrong: set[str]
) -> Iterator[ConfigIssue]:
    """The small parts are built once for trial, so that their own checks speak now."""
    parts = {key: node for key, node, _ in _named_nodes(plain)}
    sound = {
        key: node
        for key, node in parts.items()
        if not any(bad.startswith(key) for bad in wrong) and UNKNOWN not in node.values()
    }
    build = Instantiator(trusted)
    for key in sound:
        if key.startswith(("metric.", "loss.", "data.augment.")):
            strict = {"validate_args": True} if "validate_args" in sound[key] else {}
            _, refusals = _import_error(build, key, sound[key] | strict)
            yield from refusals
    if "average" in sound:
        import torch

        _, refusals = _import_error(build, "average", sound["average"], torch.nn.Linear(1, 1))
        yield from refusals
    for key in sound:
        if key == "optimizer" or key.startswith("optimizer."):
            import torch

            parameters = [torch.nn.Parameter(torch.zeros(1))]
            optimizer, refusals = _import_error(build, key, sound[key], parameters)
            yield from refusals
            scheduler = "scheduler.lr_scheduler"
            if scheduler in sound and not refusals:
                _, refusals = _import_error(build, scheduler, sound[scheduler], optimizer)
                yield from refusals


def _import_error(
    build: Instantiator, key: str, node: Any, *given: Any
) -> tuple[Any, list[ConfigIssue]]:
    try:
        return build(key, node, *given), []
    except UserError as error:
        return None, [ConfigIssue("", str(error))]
