"""The saved configuration of a run: resolved, but references to its own keys stay alive.

An override of `data.num_classes` must still reach the model that refers to it when the run is
resumed or tested. Everything else is saved as the value that it had when the run started: what
resolvers returned, absolute paths, and `${oc.env:NAME}` in place of a secret.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import NoneType
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from app.config import resolvers
from app.config.limits import charge, enter_value, resolution_budget, text_cost
from app.config.nested import dotted, iter_leaves, map_strings, shorten
from app.config.resolve import PER_COMMAND_KEYS, PlainConfig, resolve
from app.runtime.errors import ConfigError, ConfigIssue, UserError

SavedConfig = dict[str, Any]  # JSON values
LEAF_TYPES = (str, int, float, bool, NoneType, dict, list)  # empty groups and lists are leaves
# These resolvers only use their arguments; others, such as `oc.env`, read from this machine.
HARMLESS_CALL = re.compile(r"\$\{\s*(?:or|path|image_part)\s*:")
REFERENCE = re.compile(r"\$\{\s*([\w.@/\[\]-]+)\s*\}")
FROZEN_ROOTS = (*PER_COMMAND_KEYS, "hydra")  # references to these keys are saved as values
SECRET_START = re.compile(r"\$\{(?=oc\.env:[\w.-]+\})")
LITERAL_START = re.compile(r"\$\{(?!oc\.env:[\w.-]+\})")
ABSOLUTE_START = re.compile(r"/|(?:\$\{\s*path\s*:\s*)?(?:/|\$\{\s*(?!path\s*:))")
QUOTE = "\ue000{"  # stands for a `${` that must not be interpolated; of the private use area


def half_resolve(config: DictConfig, plain: PlainConfig) -> SavedConfig:
    """Return what is saved of a configuration.

    Args:
        config: As composed.
        plain: The same, resolved.
    """
    raw = OmegaConf.to_container(config, resolve=False)
    saved: SavedConfig = _keep_references(raw, plain)
    return saved


def _keep_references(raw: Any, plain: Any) -> Any:
    if isinstance(raw, dict) and isinstance(plain, dict):
        by_name = {str(name): child for name, child in raw.items()}
        return {n: _keep_references(by_name[n], child) for n, child in plain.items()}
    if isinstance(raw, list) and isinstance(plain, list):
        return [_keep_references(*pair) for pair in zip(raw, plain, strict=True)]
    if isinstance(raw, str) and _stays_alive(raw, plain):
        return raw
    return map_strings(lambda text: LITERAL_START.sub(QUOTE, text), plain)


def _stays_alive(raw: str, plain: Any) -> bool:
    """Return whether a text is saved with its references instead of as its value."""
    if "${" not in raw or not is_harmless(raw):
        return False
    if isinstance(plain, str) and Path(plain).is_absolute() and not ABSOLUTE_START.match(raw):
        return False  # a path that would depend on the folder of a later command
    roots = [key.partition(".")[0] for key in REFERENCE.findall(raw)]
    return not any(root in FROZEN_ROOTS for root in roots)


def is_harmless(text: str) -> bool:
    """Return whether interpolating a text uses nothing but other keys of the configuration."""
    return "${" not in REFERENCE.sub("", HARMLESS_CALL.sub("", text))


def check_saved(saved: SavedConfig, source: str) -> None:
    """Check a saved configuration, which may come from someone else.

    Args:
        saved: Configuration as a checkpoint contains it.
        source: File that contains it, for errors.

    Raises:
        UserError: It has other values than a configuration can have, reads anything but its own
            keys and secrets, or expands without bound.
    """
    source = f"{source}: the saved configuration"
    for path, leaf in iter_leaves(saved):
        if not all(isinstance(name, (str, int)) for name in path) or type(leaf) not in LEAF_TYPES:
            raise UserError(f"{source} has a {type(leaf).__name__} at {dotted(path)}")
        if isinstance(leaf, str) and not is_harmless(SECRET_START.sub(QUOTE, leaf)):
            key = dotted(path)
            raise UserError(f"{source} reads more than its own keys: {key}={shorten(leaf)}")
    try:
        resolve_saved(saved)
    except ConfigError as error:
        raise UserError(f"{source} cannot be used: {error.issues[0]}") from error


def resolve_saved(saved: SavedConfig) -> PlainConfig:
    """Resolve the references; those to secrets stay, see `app.config.secrets`.

    Raises:
        ConfigError: A reference does not resolve, or the result would be too large.
    """
    resolvers.register()  # a rank that resumes has composed no configuration
    with resolution_budget():
        for path, leaf in iter_leaves(saved):
            enter_value(path)
            charge(text_cost(leaf))
        quoted = map_strings(lambda text: SECRET_START.sub(QUOTE, text), saved)
        try:
            config = OmegaConf.create(quoted)
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            raise ConfigError([ConfigIssue("", str(error).splitlines()[0])]) from error
    plain, issues = resolve(config)
    if issues:
        raise ConfigError(issues)
    resolved: PlainConfig = map_strings(lambda text: text.replace(QUOTE, "${"), plain)
    return resolved
