"""Resolve a composed configuration to one plain dict, which a run receives and saves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from app.config.nested import get_at, iter_children
from app.config.secrets import find_secrets, redact
from app.config.types import MISSING, UNKNOWN
from app.runtime.errors import ConfigIssue

PlainConfig = dict[str, Any]
# Keys of the current command, which a saved run does not decide.
PER_COMMAND_KEYS = (
    "mode",
    "ckpt",
    "resume",
    "launch",
    "name",
    "tags",
    "notes",
    "trusted_targets",
    "sweep",
)


def resolve(config: DictConfig) -> tuple[PlainConfig, list[ConfigIssue]]:
    """Resolve all interpolations and make all paths absolute.

    Values of secret environment variables stay unresolved, see `app.config.secrets`.

    Returns:
        The plain configuration, and an issue for each interpolation that cannot be resolved.
    """
    issues: list[ConfigIssue] = []
    names = [name for name in config if name != "hydra"]
    plain = {str(name): _resolve_child(config, name, str(name), issues) for name in names}
    _make_paths_absolute(plain)
    raw = OmegaConf.to_container(config, resolve=False)
    assert isinstance(raw, dict)
    secrets = find_secrets({name: value for name, value in raw.items() if name != "hydra"})
    return redact(plain, secrets), issues


def _resolve_child(parent: Any, name: Any, key: str, issues: list[ConfigIssue]) -> Any:
    if OmegaConf.is_missing(parent, name):
        return MISSING
    try:
        value = parent[name]
    except InterpolationToMissingValueError:
        return UNKNOWN
    except OmegaConfBaseException as error:
        issues.append(ConfigIssue(key, f" does not resolve: {str(error).splitlines()[0]}"))
        return UNKNOWN
    if isinstance(value, DictConfig):
        return {str(k): _resolve_child(value, k, f"{key}.{k!s}", issues) for k in value}
    if isinstance(value, ListConfig):
        return [_resolve_child(value, i, f"{key}.{i}", issues) for i in range(len(value))]
    return value


def _make_paths_absolute(plain: PlainConfig) -> None:
    """Make the paths of the checkpoint and of the data absolute, in place."""
    if isinstance(plain.get("ckpt"), str) and plain["ckpt"]:
        plain["ckpt"] = _absolute_path(plain["ckpt"])
    data = plain.get("data")
    if isinstance(data, dict):
        if isinstance(data.get("path"), str) and _exists(data["path"]):
            data["path"] = _absolute_path(data["path"])
        _make_source_paths_absolute(data.get("source"))


def _make_source_paths_absolute(node: Any) -> None:
    for name, value in iter_children(node):
        # A path that does not exist may be a name on a hub; a root may be a folder to create.
        is_path = name == "root" or (name == "path" and isinstance(value, str) and _exists(value))
        if is_path and isinstance(value, str) and value != MISSING:
            node[name] = _absolute_path(value)
        else:
            _make_source_paths_absolute(value)


def _absolute_path(text: str) -> str:
    return str(Path(text).expanduser().absolute())


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
