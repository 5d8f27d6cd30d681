"""Checks of Hydra's own settings, which instantiate objects and configure logging.

Components of a run are validated by `app.config.validate`, and built from the resolved
configuration. Hydra instead resolves its own nodes when it acts, so that anything whose value could
differ by then is refused here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig, OmegaConf

from app.config.allowlist import TargetError, is_dotted_name, is_trusted, locate, trust_hint
from app.config.limits import interpolations
from app.config.nested import KeyPath, dotted, get_at, get_child, iter_leaves
from app.config.overrides import is_overridden, parse_overrides, raw_override
from app.config.secrets import looks_secret
from app.runtime.errors import ConfigError, ConfigIssue, join_choices

INSTANTIATED_NODES = ("launcher", "sweeper", "callbacks")
LOGGING_NODES = ("job_logging", "hydra_logging")
COMPONENT_MODULES = ("hydra.experimental.callbacks", "optuna.samplers", "optuna.pruners")
LOGGING_CLASSES = (
    "logging.StreamHandler",
    "logging.FileHandler",
    "logging.NullHandler",
    "logging.handlers.RotatingFileHandler",
    "logging.handlers.TimedRotatingFileHandler",
    "colorlog.ColoredFormatter",
)
LOG_STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
# Resolvers that return text, never a node.
TEXT_RESOLVERS = ("oc.env", "now", "path", "run_name", "run_folder", "python_version")
COMMAND_LINE_ONLY = ("hydra", "trusted_targets")


def hydra_issues(
    config: DictConfig, overrides: Sequence[Override], trusted: Sequence[str]
) -> Iterator[ConfigIssue]:
    """Yield every setting that Hydra must not act on.

    Args:
        config: Composed configuration including the `hydra` node.
        overrides: Overrides from the command line. Files and environment variables set there are
            the user's own decision, and allowed.
        trusted: Modules that the user trusts by name.
    """
    raw: Any = OmegaConf.to_container(config, resolve=False, enum_to_str=True)
    hydra = raw["hydra"]
    for name in ("launcher", "sweeper"):
        if get_at(hydra, (name, "_target_")) is None:
            yield ConfigIssue(
                f"hydra/{name}", f"={hydra.get(name)!r} is not a component; Hydra needs one"
            )
    for name in INSTANTIATED_NODES:
        for path, leaf in iter_leaves(hydra.get(name), ("hydra", name)):
            yield from _component_issues(path, leaf, raw, trusted)
    for name in LOGGING_NODES:
        for path, leaf in iter_leaves(hydra.get(name), ("hydra", name)):
            if isinstance(leaf, str):
                yield from _logging_issues(path, leaf, trusted)
    yield from _param_issues(hydra.get("sweeper"))
    yield from _job_issues(hydra, overrides)
    typed = [raw_override(override) for override in overrides]
    for text in [*hydra["overrides"]["task"], *hydra["overrides"]["hydra"]]:
        if text not in typed:
            problem = f" contains {text!r}, which is not on the command line"
            yield ConfigIssue("hydra.overrides", problem)


def _component_issues(
    path: KeyPath, value: Any, raw: dict[str, Any], trusted: Sequence[str]
) -> Iterator[ConfigIssue]:
    """Check a value of a component that Hydra builds; it is not resolved yet."""
    key = dotted(path)
    if "_target_" not in path:
        if isinstance(value, str) and not _is_text(value, raw):
            yield ConfigIssue(
                key,
                f"={value!r} could resolve to a component; "
                "interpolations are not allowed for components of Hydra",
            )
        return
    if path[-1] != "_target_" or not is_dotted_name(value):
        problem = f"={value!r} is not a dotted name; interpolations are not allowed here"
        yield ConfigIssue(key, problem)
        return
    is_plugin = len(path) == 3 and path[1] != "callbacks"
    if not is_trusted(value, trusted) and not _is_component(value, is_plugin):
        allowed = join_choices(installed_plugins() if is_plugin else COMPONENT_MODULES)
        yield ConfigIssue(key, f"={value!r} is not allowed; allowed: {allowed}")
        yield ConfigIssue("", trust_hint([value]))


def _is_component(name: str, is_plugin: bool) -> bool:
    """Return whether Hydra may build this: a plugin, or a callback, sampler or pruner."""
    if is_plugin:
        return name in installed_plugins()
    if name.rpartition(".")[0] not in COMPONENT_MODULES:
        return False
    with suppress(TargetError):
        return callable(locate(name))
    return False


def _logging_issues(path: KeyPath, text: str, trusted: Sequence[str]) -> Iterator[ConfigIssue]:
    """Check a class or stream that logging would create or open."""
    key = dotted(path)
    if path[-1] in ("class", "()"):
        if text not in LOGGING_CLASSES and not is_trusted(text, trusted):
            allowed = join_choices(LOGGING_CLASSES)
            yield ConfigIssue(key, f"={text!r} is not allowed; allowed: {allowed}")
    elif "." in path:
        yield ConfigIssue(key, f"={text!r}: attributes of handlers cannot be set")
    elif path[-1] == "filename":
        return  # see `app.config.hydra_files`
    elif "${" in text:
        problem = f"={text!r}: interpolations are not allowed in Hydra's logging configuration"
        yield ConfigIssue(key, problem)
    elif "://" in text and text not in LOG_STREAMS:
        yield ConfigIssue(key, f"={text!r} is not allowed; allowed: {join_choices(LOG_STREAMS)}")


def _is_text(text: str, raw: dict[str, Any], depth: int = 0) -> bool:
    """Return whether a string resolves to text at any time, never to a node."""
    if not (text.startswith("${") and text.endswith("}")):
        return True  # there is text around the interpolation
    if text[2:-1] not in interpolations(text):
        # Several interpolations; but quotes could hide where one of them ends.
        return not re.search(r"[\\'\"]", text)
    match = re.fullmatch(r"(?:(hydra|[\w.]+):)?(.*)", text[2:-1], flags=re.DOTALL)
    assert match is not None
    resolver, key = match[1], match[2]
    if resolver in TEXT_RESOLVERS:
        return True
    if resolver not in (None, "hydra") or not re.fullmatch(r"\w+(\.\w+)*", key):
        return False
    root = raw["hydra"] if resolver == "hydra" else raw
    *groups, last = key.split(".")
    group = get_at(root, groups)
    value = group.get(last) if isinstance(group, dict) else {}
    if isinstance(value, str):
        return depth < 10 and _is_text(value, raw, depth + 1)
    return not isinstance(value, (dict, list))


def installed_plugins() -> list[str]:
    """Class names of the installed launchers and sweepers."""
    plugins = Plugins.instance()
    classes = [*plugins.discover(Launcher), *plugins.discover(Sweeper)]
    return [f"{cls.__module__}.{cls.__name__}" for cls in classes]


def _param_issues(sweeper: Any) -> Iterator[ConfigIssue]:
    """Check `hydra.sweeper.params`, which become overrides of its jobs."""
    params = get_child(sweeper, "params")
    for name, value in params.items() if isinstance(params, dict) else ():
        key = f"hydra.sweeper.params.{name}"
        try:
            (override,) = parse_overrides([f"{name}={value}"])
        except ConfigError:
            yield ConfigIssue(key, f"={value!r} cannot be read as key=value")
            continue
        roots = [re.split(r"[./]", text)[0] for text in (override.key_or_group, str(name))]
        if any(root in COMMAND_LINE_ONLY for root in roots):
            yield ConfigIssue(key, f"={value!r} can only be set on the command line")


def _job_issues(hydra: dict[str, Any], overrides: Sequence[Override]) -> Iterator[ConfigIssue]:
    """Check the environment variables of jobs, and what Hydra resolves while it composes."""
    for path, leaf in iter_leaves(hydra["job"].get("config"), ("hydra", "job", "config")):
        if isinstance(leaf, str) and "${" in leaf:
            yield ConfigIssue(dotted(path), f"={leaf!r}: interpolations are not allowed here")
    env_set = hydra["job"].get("env_set")
    if isinstance(env_set, str):
        problem = f"={env_set!r}: interpolations are not allowed here"
        yield ConfigIssue("hydra.job.env_set", problem)
        return
    for variable, value in (env_set or {}).items():
        key = f"hydra.job.env_set.{variable}"
        if os.environ.get(variable) != value and not is_overridden(key, overrides):
            yield ConfigIssue(key, f"={value!r} can only be set on the command line")
        elif looks_secret(variable) and os.environ.get(variable) == value:
            problem = " would be saved with the run; jobs inherit the variable anyway"
            yield ConfigIssue(key, problem)
