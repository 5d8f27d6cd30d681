"""Resolve a composed configuration to one plain dict, which a run receives and saves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from app.config.limits import LimitError, charge, enter_value, resolution_budget, text_cost
from app.config.nested import KeyPath, dotted, get_at, iter_children
from app.config.resolvers import absolute_path
from app.config.secrets import hidden_secrets, secret_names
from app.config.types import MISSING, UNKNOWN
from app.runtime.errors import ConfigError, ConfigIssue

PlainConfig = dict[str, Any]
CIRCULAR_MESSAGES = ("Recursive interpolation detected", "Interpolation to parent node detected")
# Keys of the current command, which a saved run does not decide.
PER_COMMAND_KEYS = (
    "mode",
    "check",
    "ckpt",
    "resume",
    "output",
    "launch",
    "name",
    "tags",
    "notes",
    "trusted_targets",
    "sweep",
)


def resolve(config: DictConfig) -> tuple[PlainConfig, list[ConfigIssue]]:
    """Resolve all interpolations except those of Hydra's node, and make all paths absolute.

    In place of a secret is its reference, see `app.config.secrets`.

    Returns:
        The plain configuration, and an issue for each interpolation that cannot be resolved.

    Raises:
        ConfigError: The resolved configuration would be too large or nested too deep.
    """
    plain, issues = resolve_keys(config, [name for name in config if name != "hydra"])
    _make_paths_absolute(plain)
    return plain, issues


def resolve_keys(config: DictConfig, names: Sequence[Any]) -> tuple[PlainConfig, list[ConfigIssue]]:
    """Resolve some keys of a configuration; see `resolve`."""
    with hidden_secrets(), resolution_budget():
        while True:
            num_secrets = len(secret_names)
            issues: list[ConfigIssue] = []
            plain = {str(n): _resolve_child(config, n, (str(n),), issues) for n in names}
            if len(secret_names) == num_secrets:
                return plain, issues
            # A variable was read for a secret key, perhaps after it was read for another one.


def _resolve_child(parent: Any, name: Any, path: KeyPath, issues: list[ConfigIssue]) -> Any:
    enter_value(path)
    if OmegaConf.is_missing(parent, name):
        return MISSING
    try:
        value = parent[name]
    except LimitError:
        raise
    except InterpolationToMissingValueError:
        return UNKNOWN
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        if any(message in reason for message in CIRCULAR_MESSAGES):
            problem = " refers to itself through its interpolations"
            raise ConfigError([ConfigIssue(dotted(path), problem)]) from error
        issues.append(ConfigIssue(dotted(path), f" does not resolve: {reason}"))
        return UNKNOWN
    return _resolve_value(value, path, issues)


def _resolve_value(value: Any, path: KeyPath, issues: list[ConfigIssue]) -> Any:
    enter_value(path)
    charge(text_cost(value))
    if isinstance(value, DictConfig):
        return {str(k): _resolve_child(value, k, (*path, str(k)), issues) for k in value}
    if isinstance(value, ListConfig):
        return [_resolve_child(value, i, (*path, i), issues) for i in range(len(value))]
    if isinstance(value, dict):  # a resolver may return these, with configurations in them
        return {str(k): _resolve_value(v, (*path, str(k)), issues) for k, v in value.items()}
    if isinstance(value, list):
        return [_resolve_value(v, (*path, i), issues) for i, v in enumerate(value)]
    return value


@contextmanager
def hydra_config(config: DictConfig) -> Iterator[None]:
    """Let `${hydra:...}` read this configuration while the context is open."""
    instance: Any = HydraConfig.instance()
    before, instance.cfg = instance.cfg, config  # `set_config` would make it read-only
    try:
        yield
    finally:
        instance.cfg = before


def _make_paths_absolute(plain: PlainConfig) -> None:
    """Make the paths of checkpoints and of the data absolute, in place."""
    for node, name in ((plain, "ckpt"), (plain, "teacher"), (plain.get("init"), "weights")):
        if isinstance(node, dict) and isinstance(node.get(name), str) and node[name]:
            node[name] = absolute_path(node[name])
    data = plain.get("data")
    if isinstance(data, dict):
        if isinstance(data.get("path"), str) and _exists(data["path"]):
            data["path"] = absolute_path(data["path"])
        _make_source_paths_absolute(data.get("source"))


def _make_source_paths_absolute(node: Any) -> None:
    for name, value in iter_children(node):
        # A path that does not exist may be a name on a hub; a root may be a folder to create.
        is_path = name == "root" or (name == "path" and isinstance(value, str) and _exists(value))
        if is_path and isinstance(value, str) and value != MISSING:
            node[name] = absolute_path(value)
        else:
            _make_source_paths_absolute(value)


def _exists(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, ValueError):  # not even a path
        return False


def cli_trusted(overrides: Sequence[Override]) -> list[str]:
    """Modules that `trusted_targets=[...]` names on the command line itself."""
    values = [o.value() for o in overrides if o.key_or_group == "trusted_targets"]
    names = values[-1] if values else []
    return [str(name) for name in (names if isinstance(names, list) else [names])]


def get_by_path(config: Any, key: str) -> Any:
    """Return the value at a dotted key, or None if there is none."""
    return get_at(config, key.split("."))
