"""A composed configuration as one plain dict: what a run is told, saves, and is tested by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from app.config.errors import ConfigError, Mistake
from app.config.typed import MISSING

FILE_KEYS = ("path", "root")  # arguments of data sources that name files
NOW = ("mode", "ckpt", "name", "tags", "notes", "trusted_targets")  # of this command, never saved


def freeze(config: DictConfig) -> dict[str, Any]:
    """All interpolations resolved, all paths absolute.

    Raises:
        ConfigError: Every interpolation that does not resolve.
    """
    mistakes: list[Mistake] = []
    names = [name for name in config if name != "hydra"]
    plain = {str(name): _resolved(config, name, str(name), mistakes) for name in names}
    if mistakes:
        raise ConfigError(mistakes)
    if isinstance(plain.get("ckpt"), str):
        plain["ckpt"] = _absolute(plain["ckpt"])
    if isinstance(plain.get("data"), dict):
        _absolute_sources(plain["data"].get("source"))
    return plain


def _resolved(parent: Any, name: Any, key: str, mistakes: list[Mistake]) -> Any:
    if OmegaConf.is_missing(parent, name):
        return MISSING
    try:
        value = parent[name]
    except InterpolationToMissingValueError:
        return MISSING
    except OmegaConfBaseException as error:
        mistakes.append(Mistake(key, f" does not resolve: {str(error).splitlines()[0]}"))
        return None
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


def typed_trust(overrides: Sequence[Override]) -> list[str]:
    """The modules named by `trusted_targets=[...]` on the command line itself."""
    values = [o.value() for o in overrides if o.key_or_group == "trusted_targets"]
    names = values[-1] if values else []
    return [str(name) for name in (names if isinstance(names, list) else [names])]


def over_saved(
    saved: dict[str, Any], today: dict[str, Any], overrides: Sequence[Override]
) -> tuple[dict[str, Any], list[str]]:
    """A saved run's configuration with what was typed now laid over it.

    Args:
        saved: The run's own configuration, resolved.
        today: The configuration composed now, resolved; typed values are taken from it.
        overrides: What was typed.

    Returns:
        The configuration, and a line for each difference to the saved one.

    Raises:
        ConfigError: An override that would make it another model or another split.
    """
    merged: dict[str, Any] = {**saved, **{name: today[name] for name in NOW}}
    mistakes, differences = [], []
    for override in overrides:
        key = override.package or override.key_or_group
        if key.partition(".")[0] in NOW or override.is_hydra_override():
            continue
        if key in ("experiment", "debug", "local"):
            problem = " sets keys all over and cannot be laid over a saved run; type the keys"
            mistakes.append(Mistake(key, problem))
            continue
        old, new = _select(saved, key), _select(today, key)
        if old == new:
            continue
        if key.partition(".")[0] == "model" or key.startswith("data.split"):
            mistakes.append(
                Mistake(key, f"={_brief(new)} is not what the run was trained with: {_brief(old)}")
            )
        merged = _put(merged, key.split("."), new)
        differences.append(f"{key}: {_brief(old)} -> {_brief(new)}")
    if mistakes:
        raise ConfigError(mistakes)
    return merged, differences


def _brief(value: object) -> str:
    target = value.get("_target_") if isinstance(value, dict) else None
    text = str(target) if target else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _select(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = config.get(name) if isinstance(config, dict) else None
    return config


def _put(config: dict[str, Any], names: list[str], value: Any) -> dict[str, Any]:
    first, *rest = names
    if not rest:
        return {**config, first: value}
    inner = config.get(first)
    return {**config, first: _put(inner if isinstance(inner, dict) else {}, rest, value)}
