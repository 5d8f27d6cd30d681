"""Checks of Hydra's own settings, which instantiate objects and configure logging.

Components of a run are validated by `app.config.validate`, and built from the resolved
configuration. Hydra instead composes again before it acts, so that anything whose value could
differ by then is refused here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig, OmegaConf

from app.config.allowlist import is_trusted
from app.config.limits import interpolations
from app.config.overrides import parse_overrides, raw_override
from app.config.secrets import looks_secret
from app.runtime.errors import ConfigError, ConfigIssue, join_choices

INSTANTIATED_NODES = ("launcher", "sweeper", "callbacks")
LOGGING_NODES = ("job_logging", "hydra_logging")
COMPONENT_PREFIXES = ("hydra.experimental.callbacks.", "optuna.samplers.", "optuna.pruners.")
LOGGING_CLASSES = (
    "logging.StreamHandler",
    "logging.FileHandler",
    "logging.NullHandler",
    "logging.handlers.RotatingFileHandler",
    "logging.handlers.TimedRotatingFileHandler",
    "colorlog.ColoredFormatter",
)
LOG_STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
RUN_FOLDER_PREFIXES = ("${hydra.runtime.output_dir}/", "${hydra.run.dir}/", "${hydra.sweep.dir}/")
# Resolvers that return text, never a node.
TEXT_RESOLVERS = ("oc.env", "now", "path", "run_name", "run_folder", "python_version")
COMMAND_LINE_ONLY = ("hydra", "trusted_targets")
TRUST_HINT = "if the code is yours, add trusted_targets=[{}] to the command line"


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
    checker = _NodeChecker(raw, trusted)
    for name in ("launcher", "sweeper"):
        if not (isinstance(hydra.get(name), dict) and hydra[name].get("_target_")):
            yield ConfigIssue(
                f"hydra/{name}", f"={hydra.get(name)!r} is not a component; Hydra needs one"
            )
    for name in INSTANTIATED_NODES:
        yield from checker.component_issues(f"hydra.{name}", hydra.get(name))
    for name in LOGGING_NODES:
        yield from checker.logging_issues(f"hydra.{name}", hydra.get(name), overrides)
    yield from _param_issues(hydra.get("sweeper"))
    yield from _job_issues(hydra, overrides)
    for override in [*hydra["overrides"]["task"], *hydra["overrides"]["hydra"]]:
        if override not in [raw_override(o) for o in overrides]:
            problem = f" contains {override!r}, which is not on the command line"
            yield ConfigIssue("hydra.overrides", problem)


class _NodeChecker:
    """Checks unresolved nodes, so that interpolations are seen as such."""

    def __init__(self, raw: dict[str, Any], trusted: Sequence[str]) -> None:
        self.raw, self.trusted = raw, trusted

    def component_issues(self, key: str, node: Any) -> Iterator[ConfigIssue]:
        """Yield issues of all `_target_`s of a node, at any depth."""
        if isinstance(node, str) and not self._is_text(node, 0):
            yield ConfigIssue(
                key,
                f"={node!r} could resolve to a component; "
                "interpolations are not allowed for components of Hydra",
            )
        for name, child in _children(node):
            if name == "_target_":
                yield from self._target_issues(f"{key}._target_", child)
            else:
                yield from self.component_issues(f"{key}.{name}", child)

    def _target_issues(self, key: str, name: object) -> Iterator[ConfigIssue]:
        is_plugin = key.count(".") == 2 and ".callbacks" not in key
        allowed = installed_plugins() if is_plugin else COMPONENT_PREFIXES
        if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
            problem = f"={name!r} is not a dotted name; interpolations are not allowed here"
            yield ConfigIssue(key, problem)
        elif not _matches(name, allowed) and not is_trusted(name, self.trusted):
            hint = TRUST_HINT.format(name.rpartition(".")[0] or name)
            yield ConfigIssue(
                key, f"={name!r} is not allowed; allowed: {join_choices(allowed)}; {hint}"
            )

    def logging_issues(
        self, key: str, node: Any, overrides: Sequence[Override]
    ) -> Iterator[ConfigIssue]:
        """Yield issues of the classes, streams and files that logging would create or open."""
        if isinstance(node, str):
            yield from self._logging_value_issues(key, node, overrides)
        for name, child in _children(node):
            yield from self.logging_issues(f"{key}.{name}", child, overrides)

    def _logging_value_issues(
        self, key: str, text: str, overrides: Sequence[Override]
    ) -> Iterator[ConfigIssue]:
        name = key.rpartition(".")[2]
        if name in ("class", "()"):
            if text not in LOGGING_CLASSES and not is_trusted(text, self.trusted):
                allowed = join_choices(LOGGING_CLASSES)
                yield ConfigIssue(key, f"={text!r} is not allowed; allowed: {allowed}")
        elif name == "filename":
            is_inside = text.startswith(RUN_FOLDER_PREFIXES) and ".." not in text
            if not is_inside and not _is_overridden(key, overrides):
                allowed = f"{RUN_FOLDER_PREFIXES[0]}NAME.log"
                yield ConfigIssue(key, f"={text!r} is not in the run folder; allowed: {allowed}")
        elif "${" in text:
            problem = f"={text!r}: interpolations are not allowed in Hydra's logging configuration"
            yield ConfigIssue(key, problem)
        elif "://" in text and text not in LOG_STREAMS:
            yield ConfigIssue(
                key, f"={text!r} is not allowed; allowed: {join_choices(LOG_STREAMS)}"
            )

    def _is_text(self, text: str, depth: int) -> bool:
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
        value: Any = self.raw["hydra"] if resolver == "hydra" else self.raw
        for name in key.split("."):
            if not isinstance(value, dict):
                return False
            value = value.get(name)
        is_text = isinstance(value, str) and depth < 10 and self._is_text(value, depth + 1)
        return is_text or not isinstance(value, (str, dict, list))


def installed_plugins() -> list[str]:
    """Class names of the installed launchers and sweepers."""
    plugins = Plugins.instance()
    classes = [*plugins.discover(Launcher), *plugins.discover(Sweeper)]
    return [f"{cls.__module__}.{cls.__name__}" for cls in classes]


def _children(node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        yield from ((str(name), child) for name, child in node.items())
    elif isinstance(node, list):
        yield from ((str(index), child) for index, child in enumerate(node))


def _matches(name: str, allowed: Sequence[str]) -> bool:
    """Return whether the name is allowed; a prefix allows only the names right below it."""
    return name in allowed or f"{name.rpartition('.')[0]}." in allowed


def _is_overridden(key: str, overrides: Sequence[Override]) -> bool:
    """Return whether an override sets the key, one of its parents or one of its children."""
    keys = [override.key_or_group for override in overrides]
    return any(f"{key}.".startswith(f"{other}.") or other.startswith(f"{key}.") for other in keys)


def _param_issues(sweeper: Any) -> Iterator[ConfigIssue]:
    """Check `hydra.sweeper.params`, which become overrides of its jobs."""
    params = sweeper.get("params") if isinstance(sweeper, dict) else None
    for name, value in _children(params):
        key = f"hydra.sweeper.params.{name}"
        try:
            keys = [override.key_or_group for override in parse_overrides([f"{name}={value}"])]
        except (ConfigError, HydraException):
            yield ConfigIssue(key, f"={value!r} cannot be read as key=value")
            continue
        roots = [other.partition(".")[0].partition("/")[0] for other in [*keys, name]]
        if any(root in COMMAND_LINE_ONLY for root in roots):
            yield ConfigIssue(key, f"={value!r} can only be set on the command line")


def _job_issues(hydra: dict[str, Any], overrides: Sequence[Override]) -> Iterator[ConfigIssue]:
    """Check for files outside the run folder, and for environment variables of the job."""
    subdir = hydra.get("output_subdir")
    if subdir is not None and not _is_overridden("hydra.output_subdir", overrides):
        path = PurePath(str(subdir))
        if path.is_absolute() or ".." in path.parts or "${" in str(subdir):
            problem = f"={subdir!r} is not a folder inside the run folder"
            yield ConfigIssue("hydra.output_subdir", problem)
    name = hydra["job"].get("name")
    if not re.fullmatch(r"[\w.-]+", str(name), flags=re.ASCII) or ".." in str(name):
        problem = f"={name!r} contains invalid characters; allowed: letters, digits, _ . -"
        yield ConfigIssue("hydra.job.name", problem)
    for variable, value in _children(hydra["job"].get("env_set")):
        key = f"hydra.job.env_set.{variable}"
        if os.environ.get(variable) != value and not _is_overridden(key, overrides):
            yield ConfigIssue(key, f"={value!r} can only be set on the command line")
        elif looks_secret(variable) and os.environ.get(variable) == value:
            problem = " would be saved with the run; jobs inherit the variable anyway"
            yield ConfigIssue(key, problem)
