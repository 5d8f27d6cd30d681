"""Validate the complete configuration before anything starts, and report all errors at once."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from app.config.instantiate import Instantiator, is_required, iter_node_issues
from app.config.nested import dotted, get_at, iter_leaves
from app.config.optimizers import argument_nodes, complete_nodes, optimizer_nodes, option_issues
from app.config.rules import rule_issues
from app.config.schema import AUTO, STAGES, Config
from app.config.types import UNKNOWN, iter_issues, to_dataclass
from app.runtime.errors import ConfigError, ConfigIssue, UserError

PlacedNode = tuple[str, dict[str, Any], int]  # key, node, number of positional arguments
SCHEDULER = "scheduler.lr_scheduler"
COMPONENTS = ("model", "task", "average", "data.sampling")
COMPONENT_GROUPS = (
    *("loss", "callbacks", "data.source", "data.augment"),
    *("data.transforms.train", "data.transforms.eval"),
    *(f"metric.{stage}" for stage in STAGES),
)
# Sources that had an argument `transforms` once.
SOURCES_WITHOUT_TRANSFORMS = ("app.data.images.image_folder", "app.data.hugging_face.hugging_face")
# Groups that are built to check them. They have no datasets or callbacks, which may write files.
BUILT_GROUPS = ("metric.", "loss.", "data.augment.", "data.transforms.")
BUILT = (*BUILT_GROUPS, "average", "optimizer", "scheduler.")
FILE_PACKAGES = ("app.callbacks.", "app.data.", "torchvision.datasets.")
TRANSFORMS = ("app.data.augment.", "app.data.transform.")
INJECTED_ARGUMENTS = {  # passed to components that have a parameter of that name
    "callbacks": ("folder", "model", "config", "paths", "summarize"),
    "task": ("model", "loss", "metrics", "precision", "teacher"),
    "average": ("model",),
}


class Overridden(NamedTuple):
    """What the overrides of a command set.

    Attributes:
        keys: Keys and groups; "" is everything.
        has_errors: Whether some overrides are wrong, so that they are left out.
    """

    keys: Sequence[str]
    has_errors: bool = False

    def contains(self, key: str) -> bool:
        """Return whether a key is one of them, is inside one, or contains one."""
        return any(
            name in ("", key) or key.startswith(f"{name}.") or name.startswith(f"{key}.")
            for name in self.keys
        )


EVERYTHING = Overridden([""])


def validate(
    plain: dict[str, Any],
    trusted: Sequence[str],
    known_issues: Sequence[ConfigIssue] = (),
    overridden: Overridden = EVERYTHING,
) -> Config:
    """Validate a configuration and return it typed.

    Args:
        plain: Resolved configuration, see `app.config.resolve.resolve`.
        trusted: Modules outside this program that the user trusts by name.
        known_issues: Issues found before, to be reported together with the others.
        overridden: What today's command sets, see `config_issues`.

    Raises:
        ConfigError: Lists everything that is wrong.
    """
    issues = config_issues(plain, trusted, known_issues, overridden)
    if issues:
        raise ConfigError(issues)
    return to_dataclass(plain, Config)


def config_issues(
    plain: dict[str, Any],
    trusted: Sequence[str],
    known_issues: Sequence[ConfigIssue] = (),
    overridden: Overridden = EVERYTHING,
) -> list[ConfigIssue]:
    """Return everything that is wrong with a configuration; see `validate`.

    To check components their libraries are imported, which takes seconds. If there are errors
    already, only those that overrides set are checked: nothing is wrong with the others.
    """
    issues = [*known_issues, *iter_issues("", plain, Config)]
    issues += rule_issues(plain, tuple(issue.key for issue in issues))
    issues += _optimizer_issues(plain)
    sets = overridden.contains if issues or overridden.has_errors else EVERYTHING.contains
    nodes = [node for node in _iter_nodes(plain) if sets(node[0])]
    issues += _target_issues(nodes, trusted)
    invalid_keys = {issue.key for issue in issues}
    if not any(key.startswith("model") for key in invalid_keys):
        issues += _model_name_issues(plain["model"])
    return issues + _build_issues(plain, nodes, trusted, invalid_keys)


def _optimizer_issues(plain: dict[str, Any]) -> Iterator[ConfigIssue]:
    for key, node in optimizer_nodes(plain["optimizer"]).items():
        yield from option_issues(key, node)
        rate = node.get("lr") if isinstance(node, dict) else None
        if isinstance(rate, list):
            values = ",".join(map(str, rate))
            problem = f"={rate} is not a number; for one job per value: -m {key}.lr={values}"
            yield ConfigIssue(f"{key}.lr", problem)


def _target_issues(nodes: Sequence[PlacedNode], trusted: Sequence[str]) -> Iterator[ConfigIssue]:
    for key, node, num_positional in nodes:
        if "_target_" not in node:
            yield ConfigIssue(f"{key}._target_", " is missing: the class or function to use")
        if node.get("_target_") in SOURCES_WITHOUT_TRANSFORMS and "transforms" in node:
            problem = (
                " has moved, since transforms belong to stages: use data.transforms.train and "
                "data.transforms.eval. Of a saved run, name the data again: data=..., data.path=..."
            )
            yield ConfigIssue(f"{key}.transforms", problem)
            node = {name: value for name, value in node.items() if name != "transforms"}
        yield from _misplaced_issues(key, node)
        injected = INJECTED_ARGUMENTS.get(key.partition(".")[0], ())
        yield from iter_node_issues(key, node, trusted, num_positional, injected)


def _misplaced_issues(key: str, node: dict[str, Any]) -> Iterator[ConfigIssue]:
    """Yield the datasets and callbacks in a node that is built to check it."""
    for path, name in iter_leaves(node, (key,)) if key.startswith(BUILT) else ():
        is_file_component = str(name).startswith(FILE_PACKAGES) and not name.startswith(TRANSFORMS)
        if path[-1] == "_target_" and is_file_component:
            yield ConfigIssue(dotted(path), f"={name!r} is a part of data or callbacks")


def _model_name_issues(node: dict[str, Any]) -> Iterator[ConfigIssue]:
    """Look up the names of a model from a zoo, which is not built here, since that takes long."""
    module = node["_target_"].rpartition(".")[0]
    check = getattr(sys.modules.get(module), "check_arguments", None)
    if check is None or not module.startswith("app.models."):
        return
    try:
        check(node)
    except UserError as error:
        is_about_argument = re.match(r"\w+=", str(error))
        yield ConfigIssue("model." if is_about_argument else "model: ", str(error))


def _build_issues(
    plain: dict[str, Any],
    placed: Sequence[PlacedNode],
    trusted: Sequence[str],
    invalid_keys: set[str],
) -> list[ConfigIssue]:
    """Build the small components once, so that errors of their constructors are reported too."""
    nodes = {
        key: node
        for key, node, _ in placed
        if not any(bad.startswith(key) for bad in invalid_keys)
        and UNKNOWN not in (leaf for _, leaf in iter_leaves(node))
    }
    issues: list[ConfigIssue] = []
    instantiate = Instantiator(trusted)
    for key, node in nodes.items():
        with _collect_errors(issues):
            if key.startswith(BUILT_GROUPS):
                strict = {"validate_args": True} if "validate_args" in node else {}
                instantiate(key, node | strict)
            elif key == "average":
                import torch

                instantiate(key, node, torch.nn.Linear(1, 1))
    optimizers = {key: node for key, node in _complete_optimizers(plain).items() if key in nodes}
    for key, node in optimizers.items():
        with _collect_errors(issues):
            optimizer = _trial_optimizer(instantiate, key, node)
            instantiate(SCHEDULER, nodes.get(SCHEDULER), optimizer)
    return issues


def _complete_optimizers(plain: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the optimizers, and one with the arguments of each group, by key."""
    nodes = optimizer_nodes(plain.get("optimizer"))
    complete = (complete_nodes(key, node) for key, node in nodes.items() if isinstance(node, dict))
    return {key: node for group in complete for key, node in group.items()}


def _trial_optimizer(instantiate: Instantiator, key: str, node: dict[str, Any]) -> Any:
    """Build an optimizer of a matrix, the one kind of parameter that all of them train.

    Raises:
        UserError: It refuses its arguments, or needs a closure.
    """
    import torch

    optimizer = instantiate(key, node, [torch.nn.Parameter(torch.zeros(2, 2))])
    step = inspect.signature(type(optimizer).step) if hasattr(optimizer, "step") else None
    closure = step.parameters.get("closure") if step else None
    if closure is not None and is_required(closure):
        raise UserError(
            f"{key}: {type(optimizer).__name__} needs a closure that evaluates the loss again "
            "in each step, which is not supported; for example optimizer=adamw"
        )
    return optimizer


@contextmanager
def _collect_errors(issues: list[ConfigIssue]) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        issues.append(ConfigIssue("", str(error)))


def _iter_nodes(plain: dict[str, Any]) -> Iterator[PlacedNode]:
    """Yield (key, node, number of positional arguments that the program adds) of components."""
    nodes = {key: (get_at(plain, key.split(".")), 0) for key in COMPONENTS}
    for group in COMPONENT_GROUPS:
        named = get_at(plain, group.split("."))
        for name, node in named.items() if isinstance(named, dict) else ():
            nodes[f"{group}.{name}"] = node, 0
    for key, node in optimizer_nodes(plain.get("optimizer")).items():
        checked = argument_nodes(key, node) if isinstance(node, dict) else {}
        nodes |= {key: (arguments, 1) for key, arguments in checked.items()}
    nodes[SCHEDULER] = fill_auto(get_at(plain, SCHEDULER.split(".")), 100), 1
    for key, (node, num_positional) in nodes.items():
        if isinstance(node, dict):
            yield key, node, num_positional


def fill_auto(node: Any, length: int) -> Any:
    """Replace every argument `auto` of a scheduler, at any depth, by the length of the run."""
    if isinstance(node, dict):
        return {key: fill_auto(value, length) for key, value in node.items()}
    return length if node == AUTO else node


def has_auto(node: Any) -> bool:
    """Return whether any argument is `auto`."""
    return bool(fill_auto(node, 0) != node)
