"""Which options of other launchers a file may set: none that could run a command."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from app.config.nested import KeyPath, dotted, get_at, iter_leaves
from app.runtime.errors import ConfigIssue

LAUNCHER = ("hydra", "launcher")
# Of submitit (shell commands before the job) and of Ray (packages and commands for its nodes).
COMMAND_OPTIONS = {"setup", "runtime_env", "cluster", "env_setup", "sync_up", "sync_down"}


def is_harmless(path: KeyPath, value: object) -> bool:
    """Return whether an option can be nothing but a setting: a number, a switch or one word."""
    if isinstance(value, str):
        return not COMMAND_OPTIONS & set(path) and re.fullmatch(r"[\w.-]*", value) is not None
    return value is None or isinstance(value, (bool, int, float)) or value in ([], {})


def has_unsafe_option(override: Override) -> bool:
    """Return whether a saved override sets an option that must be typed again."""
    path = tuple(override.key_or_group.split("."))
    if path[: len(LAUNCHER)] != LAUNCHER[: len(path)]:
        return False
    leaves = iter_leaves(override.value(), path)
    return not all(is_harmless(leaf, value) for leaf, value in leaves)


def iter_option_issues(
    launcher: DictConfig, overrides: Sequence[Override]
) -> Iterator[ConfigIssue]:
    """Yield an issue for each option that only the command line may set.

    Args:
        launcher: The composed node `hydra.launcher`, compared with the defaults of its package.
        overrides: Overrides of the command line.
    """
    typed = [override.key_or_group for override in overrides]
    defaults = _defaults(launcher._target_)
    for path, value in iter_leaves(OmegaConf.to_container(launcher, resolve=False), LAUNCHER):
        is_typed = any(f"{dotted(path)}.".startswith(f"{key}.") for key in typed)
        is_default = get_at(defaults, path[len(LAUNCHER) :]) == value
        if not (is_typed or is_default or is_harmless(path, value)):
            problem = f"={value!r} can only be set on the command line"
            yield ConfigIssue(dotted(path), problem)


def _defaults(target: str) -> Any:
    """Return the options with which a package has registered its launcher."""
    group: Any = ConfigStore.instance().repo["hydra"]["launcher"]
    nodes: list[Any] = [OmegaConf.to_container(option.node) for option in group.values()]
    return next((node for node in nodes if node.get("_target_") == target), {})
