"""A composed configuration as one plain dict: what a run is told, saves, and is tested by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from app.config.secrets import find_secrets, redact
from app.config.types import MISSING, UNKNOWN
from app.runtime.errors import ConfigIssue

FILE_KEYS = ("path", "root")  # arguments of data sources that name files
Plain = dict[str, Any]
# Of this command, never saved.
NOW = (
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


def resolve(config: DictConfig) -> tuple[Plain, list[ConfigIssue]]:
    """All interpolations resolved, all paths absolute; and every interpolation that is wrong.

    Secrets of the environment stay as they are written, see `app.config.secrets`.
    """
    mistakes: list[ConfigIssue] = []
    names = [name for name in config if name != "hydra"]
    plain = {str(name): _resolved(config, name, str(name), mistakes) for name in names}
    if isinstance(plain.get("ckpt"), str) and plain["ckpt"]:
        plain["ckpt"] = _absolute(plain["ckpt"])
    if isinstance(plain.get("data"), dict):
        _absolute_sources(plain["data"].get("source"))
    raw = OmegaConf.to_container(config, resolve=False)
    assert isinstance(raw, dict)
    secrets = find_secrets({name: value for name, value in raw.items() if name != "hydra"})
    return redact(plain, secrets), mistakes


def _resolved(parent: Any, name: Any, key: str, mistakes: list[ConfigIssue]) -> Any:
    if OmegaConf.is_missing(parent, name):
        return MISSING
    try:
        value = parent[name]
    except InterpolationToMissingValueError:
        return UNKNOWN
    except OmegaConfBaseException as error:
        mistakes.append(ConfigIssue(key, f" does not resolve: {str(error).splitlines()[0]}"))
        return UNKNOWN
    if isinstance(value, DictConfig):
        return {str(k): _resolved(value, k, f"{key}.{k!s}", mistakes) for k in value}
    if isinstance(value, ListConfig):
        return [_resolved(value, i, f"{key}.{i}", mistakes) for i in range(len(value))]
    return value


def _absolute(text: str) -> str:
    return str(Path(text).expanduser().absolute())


def _absolute_sources(node: Any) -> None:
    if not isinstance(node, dict):
        return
    for name, value in node.items():
        if name in FILE_KEYS and isinstance(value, str) and value != MISSING:
            node[name] = _absolute(value)
        else:
            _absolute_sources(value)


def cli_trusted(overrides: Sequence[Override]) -> list[str]:
    """The modules named by `trusted_targets=[...]` on the command line itself."""
    values = [o.value() for o in overrides if o.key_or_group == "trusted_targets"]
    names = values[-1] if values else []
    return [str(name) for name in (names if isinstance(names, list) else [names])]


def unresolved(config: DictConfig) -> DictConfig:
    """The configuration with its interpolations, less what belongs to the command alone."""
    raw = OmegaConf.to_container(config, resolve=False)
    assert isinstance(raw, dict)
    return OmegaConf.create({k: v for k, v in raw.items() if k != "hydra" and k not in NOW})


def shorten(value: object) -> str:
    target = value.get("_target_") if isinstance(value, dict) else None
    text = str(target) if target else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def get_by_path(config: Any, key: str) -> Any:
    """What is at a dotted key; None where there is nothing."""
    for name in key.split("."):
        config = config.get(name) if isinstance(config, dict) else None
    return config
