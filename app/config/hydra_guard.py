"""Checks of Hydra's own settings, which instantiate objects, configure logging and name folders.

Components of a run are validated by `app.config.validate`, and built from the resolved
configuration. Hydra instead resolves its own nodes when it acts. What it builds then is what is
resolved here; what it writes has a fixed name, or one that the command line sets.
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

from app.config.allowlist import (
    TARGET,
    TargetError,
    is_dotted_name,
    is_trusted,
    locate,
    trust_hint,
)
from app.config.nested import KeyPath, dotted, get_at, iter_leaves
from app.config.overrides import is_overridden, parse_overrides, raw_override
from app.config.resolve import hydra_config, resolve_keys
from app.config.secrets import looks_secret, referenced_secrets
from app.config.types import UNKNOWN
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
# With no other text or interpolation, a log file cannot be outside of these folders.
LOG_FILE = re.compile(
    r"\$\{hydra\.(runtime\.output_dir|sweep\.dir)\}/([\w.-]|\$\{hydra\.job\.name\})+\.log"
)
LOG_FILES = "${hydra.runtime.output_dir}/NAME.log, ${hydra.sweep.dir}/NAME.log"
FIXED = {  # what these are unless the command line sets them; they name files and folders
    "hydra.job.name": ("app",),
    "hydra.output_subdir": (".hydra", None),
    "hydra.sweep.subdir": ("${hydra.job.num}",),
}
ENV_SET = ("hydra", "job", "env_set")
TYPED_ONLY = "can only be set on the command line"
COMMAND_LINE_ONLY = ("hydra", "trusted_targets")
# These may read secrets: what is typed, and a database that the sweeper opens.
READ_SECRETS = ("hydra.overrides", "hydra.job.override_dirname", "hydra.sweeper.storage")


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
    with hydra_config(config):
        resolved, _ = resolve_keys(config, ["hydra"])  # what cannot be resolved is UNKNOWN
    yield from _component_issues(resolved["hydra"], trusted)
    for path, value in iter_leaves(resolved):
        if referenced_secrets(value) and not dotted(path).startswith(READ_SECRETS):
            # They are saved, or name what is saved.
            text = f"={value!r}: Hydra's settings must not contain a secret"
            yield ConfigIssue(dotted(path), text)
    for name in LOGGING_NODES:
        for path, leaf in iter_leaves(raw["hydra"].get(name), ("hydra", name)):
            problem = _logging_problem(path, leaf, trusted) if isinstance(leaf, str) else None
            is_typed = path[-1] == "filename" and is_overridden(dotted(path), overrides)
            if problem is not None and not is_typed:
                yield ConfigIssue(dotted(path), f"={leaf!r}{problem}")
    yield from _param_issues(raw["hydra"].get("sweeper"))
    yield from _typed_issues(raw, overrides)


def _component_issues(hydra: dict[str, Any], trusted: Sequence[str]) -> Iterator[ConfigIssue]:
    """Check what Hydra builds, also where an interpolation leads to it."""
    for name in ("launcher", "sweeper"):
        if get_at(hydra, (name, TARGET)) is None:
            yield ConfigIssue(
                f"hydra/{name}", f"={hydra.get(name)!r} is not a component; Hydra needs one"
            )
    for name in INSTANTIATED_NODES:
        for path, value in iter_leaves(hydra.get(name), ("hydra", name)):
            if value == UNKNOWN:
                yield ConfigIssue(dotted(path), " does not resolve before a job starts")
            elif TARGET in path:
                yield from _target_issues(path, value, trusted)


def _target_issues(path: KeyPath, name: Any, trusted: Sequence[str]) -> Iterator[ConfigIssue]:
    is_plugin = len(path) == 3 and path[1] != "callbacks"
    if path[-1] != TARGET or not is_dotted_name(name):
        yield ConfigIssue(dotted(path), f"={name!r} is not a dotted name")
    elif not is_trusted(name, trusted) and not _is_component(name, is_plugin):
        allowed = join_choices(installed_plugins() if is_plugin else COMPONENT_MODULES)
        yield ConfigIssue(dotted(path), f"={name!r} is not allowed; allowed: {allowed}")
        yield ConfigIssue("", trust_hint([name]))


def _is_component(name: str, is_plugin: bool) -> bool:
    """Return whether Hydra may build this: a plugin, or a callback, sampler or pruner."""
    if is_plugin:
        return name in installed_plugins()
    if name.rpartition(".")[0] not in COMPONENT_MODULES:
        return False
    with suppress(TargetError):
        return callable(locate(name))
    return False


def installed_plugins() -> list[str]:
    """Class names of the installed launchers and sweepers."""
    plugins = Plugins.instance()
    classes = [*plugins.discover(Launcher), *plugins.discover(Sweeper)]
    return [f"{cls.__module__}.{cls.__name__}" for cls in classes]


def _logging_problem(path: KeyPath, text: str, trusted: Sequence[str]) -> str | None:
    """Return why logging must not create or open a class, stream or file, or None."""
    if path[-1] in ("class", "()"):
        is_allowed = text in LOGGING_CLASSES or is_trusted(text, trusted)
        return None if is_allowed else f" is not allowed; allowed: {join_choices(LOGGING_CLASSES)}"
    if "." in path:
        return ": attributes of handlers cannot be set"
    if path[-1] == "filename":
        problem = f" is not a .log file in the run folder; allowed: {LOG_FILES}"
        return None if LOG_FILE.fullmatch(text) else problem
    if "${" in text:
        return ": interpolations are not allowed in Hydra's logging configuration"
    if "://" in text and text not in LOG_STREAMS:
        return f" is not allowed; allowed: {join_choices(LOG_STREAMS)}"
    return None


def _param_issues(sweeper: Any) -> Iterator[ConfigIssue]:
    """Check `hydra.sweeper.params`, which become overrides of its jobs."""
    params = get_at(sweeper, ["params"])
    for name, value in params.items() if isinstance(params, dict) else ():
        key = f"hydra.sweeper.params.{name}"
        try:
            (override,) = parse_overrides([f"{name}={value}"])
        except ConfigError:
            yield ConfigIssue(key, f"={value!r} cannot be read as key=value")
            continue
        roots = [re.split(r"[./]", text)[0] for text in (override.key_or_group, str(name))]
        if any(root in COMMAND_LINE_ONLY for root in roots):
            yield ConfigIssue(key, f"={value!r} {TYPED_ONLY}")


def _typed_issues(raw: dict[str, Any], overrides: Sequence[Override]) -> Iterator[ConfigIssue]:
    """Check what only the command line may set."""
    for key, defaults in FIXED.items():
        value = get_at(raw, key.split("."))
        if value not in defaults and not is_overridden(key, overrides):
            yield ConfigIssue(key, f"={value!r} {TYPED_ONLY}")
    for path, value in iter_leaves(get_at(raw, ENV_SET) or None, ENV_SET):
        variable = str(path[-1])
        is_copy = os.environ.get(variable) == value
        if not is_copy and not is_overridden(dotted(path), overrides):
            yield ConfigIssue(dotted(path), f"={value!r} {TYPED_ONLY}")
        elif is_copy and looks_secret(variable):
            problem = " would be saved with the run; jobs inherit the variable anyway"
            yield ConfigIssue(dotted(path), problem)
    typed = [raw_override(override) for override in overrides]
    for text in [*raw["hydra"]["overrides"]["task"], *raw["hydra"]["overrides"]["hydra"]]:
        if text not in typed:
            problem = f" contains {text!r}, which is not on the command line"
            yield ConfigIssue("hydra.overrides", problem)
