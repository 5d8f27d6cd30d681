"""What a configuration may tell Hydra itself, which builds parts and sets up logging on its own.

A part of a run is looked at by `app.config.validate`, is then frozen and built. Hydra composes anew
before it acts, so that here all is refused that could be something else by then.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any

from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig, OmegaConf

from app.config.allowlist import is_trusted
from app.config.limits import interpolations
from app.config.overrides import parse_overrides
from app.config.secrets import looks_secret
from app.runtime.errors import ConfigError, ConfigIssue, one_of

BUILT = ("launcher", "sweeper", "callbacks")
LOGGING = ("job_logging", "hydra_logging")
PARTS = ("hydra.experimental.callbacks.", "optuna.samplers.", "optuna.pruners.")
LOGS_WITH = (
    "logging.StreamHandler",
    "logging.FileHandler",
    "logging.NullHandler",
    "logging.handlers.RotatingFileHandler",
    "logging.handlers.TimedRotatingFileHandler",
    "colorlog.ColoredFormatter",
)
STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
OUTPUT = ("${hydra.runtime.output_dir}/", "${hydra.run.dir}/", "${hydra.sweep.dir}/")
TEXTS = ("oc.env", "now", "path", "run_name", "run_folder", "python_version")  # give no nodes
ITS_OWN = ("hydra", "trusted_targets")
WAY_OUT = "if the code is yours, add trusted_targets=[{}] to the command line"


def hydra_issues(
    config: DictConfig, words: Sequence[str], trusted: Sequence[str]
) -> Iterator[ConfigIssue]:
    """What Hydra is not to act on.

    Args:
        config: Composed, Hydra's own node included.
        words: As typed; what they say of files and of the environment is the user's own will.
        trusted: Modules that the user named himself.
    """
    raw: Any = OmegaConf.to_container(config, resolve=False, enum_to_str=True)
    own = raw["hydra"]
    look = _Look(raw, trusted)
    for name in ("launcher", "sweeper"):
        if not (isinstance(own.get(name), dict) and own[name].get("_target_")):
            yield ConfigIssue(f"hydra/{name}", f"={own.get(name)!r}; Hydra cannot do without one")
    for name in BUILT:
        yield from look.at_parts(f"hydra.{name}", own.get(name))
    for name in LOGGING:
        yield from look.at_logging(f"hydra.{name}", own.get(name), words)
    yield from _param_mistakes(own.get("sweeper"))
    yield from _job_mistakes(own, words)
    told = [*own["overrides"]["task"], *own["overrides"]["hydra"]]
    for word in told:
        if word not in words:
            yield ConfigIssue("hydra.overrides", f" has {word!r}, which was not typed")


def plugins() -> list[str]:
    """The launchers and sweepers that are installed."""
    known = Plugins.instance()
    found = [*known.discover(Launcher), *known.discover(Sweeper)]
    return [f"{one.__module__}.{one.__name__}" for one in found]


class _Look:
    """Looks at nodes as they are written, with their interpolations."""

    def __init__(self, raw: dict[str, Any], trusted: Sequence[str]) -> None:
        self.raw, self.trusted = raw, trusted

    def at_parts(self, key: str, node: Any) -> Iterator[ConfigIssue]:
        """Targets, at any depth."""
        if isinstance(node, str) and not self._is_text(node, 0):
            yield ConfigIssue(
                key, f"={node!r} may become a part; Hydra's own parts are written out"
            )
        for name, child in _children(node):
            if name == "_target_":
                yield from self._target(f"{key}._target_", child)
            else:
                yield from self.at_parts(f"{key}.{name}", child)

    def _target(self, key: str, name: object) -> Iterator[ConfigIssue]:
        allowed = plugins() if key.count(".") == 2 and ".callbacks" not in key else PARTS
        plain = isinstance(name, str) and all(part.isidentifier() for part in name.split("."))
        if not plain or not isinstance(name, str):
            yield ConfigIssue(key, f"={name!r} is not a dotted name, which it has to be here")
        elif not _is_one_of(name, allowed) and not is_trusted(name, self.trusted):
            way_out = WAY_OUT.format(name.rpartition(".")[0] or name)
            yield ConfigIssue(
                key, f"={name!r} is not allowed; allowed: {one_of(allowed)}; {way_out}"
            )

    def at_logging(self, key: str, node: Any, words: Sequence[str]) -> Iterator[ConfigIssue]:
        """Classes, streams and files that logging would make and open."""
        if isinstance(node, str):
            yield from self._logging_text(key, node, words)
        for name, child in _children(node):
            yield from self.at_logging(f"{key}.{name}", child, words)

    def _logging_text(self, key: str, text: str, words: Sequence[str]) -> Iterator[ConfigIssue]:
        name = key.rpartition(".")[2]
        if name in ("class", "()"):
            if text not in LOGS_WITH and not is_trusted(text, self.trusted):
                yield ConfigIssue(key, f"={text!r} is not allowed; allowed: {one_of(LOGS_WITH)}")
        elif name == "filename":
            beneath = text.startswith(OUTPUT) and ".." not in text
            if not beneath and not _is_typed(key, words):
                yield ConfigIssue(key, f"={text!r} is not in the run folder: {OUTPUT[0]}NAME.log")
        elif "${" in text:
            yield ConfigIssue(key, f"={text!r}: what Hydra logs with is written out")
        elif "://" in text and text not in STREAMS:
            yield ConfigIssue(key, f"={text!r} is not allowed; allowed: {one_of(STREAMS)}")

    def _is_text(self, text: str, chain: int) -> bool:
        """Whether an interpolation gives a text whenever it is resolved, never a node."""
        if not (text.startswith("${") and text.endswith("}")):
            return True  # has text around the interpolation
        if text[2:-1] not in interpolations(text):
            return not re.search(r"[\\'\"]", text)  # several; but quotes may hide where one ends
        found = re.fullmatch(r"(?:(hydra|[\w.]+):)?(.*)", text[2:-1], flags=re.DOTALL)
        assert found is not None
        if found[1] in TEXTS:
            return True
        if found[1] not in (None, "hydra") or not re.fullmatch(r"\w+(\.\w+)*", found[2]):
            return False
        path = found[2].split(".")
        value: Any = self.raw["hydra"] if found[1] == "hydra" else self.raw
        for name in path:
            if not isinstance(value, dict):
                return False
            value = value.get(name)
        inner = isinstance(value, str) and chain < 10 and self._is_text(value, chain + 1)
        return inner or not isinstance(value, (str, dict, list))


def _children(node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        yield from ((str(name), child) for name, child in node.items())
    elif isinstance(node, list):
        yield from ((str(index), child) for index, child in enumerate(node))


def _is_one_of(name: str, allowed: Sequence[str]) -> bool:
    """A prefix stands for what is right below it."""
    return name in allowed or f"{name.rpartition('.')[0]}." in allowed


def _is_typed(key: str, words: Sequence[str]) -> bool:
    """The key itself, or one that holds it or is in it."""
    typed = [word.lstrip("+~").partition("=")[0] for word in words]
    return any(f"{key}.".startswith(f"{one}.") or one.startswith(f"{key}.") for one in typed)


def _param_mistakes(sweeper: Any) -> Iterator[ConfigIssue]:
    """Parameters of a sweeper become words of its jobs, as if they had been typed."""
    params = sweeper.get("params") if isinstance(sweeper, dict) else None
    for name, value in _children(params):
        key = f"hydra.sweeper.params.{name}"
        try:
            found = [word.key_or_group for word in parse_overrides([f"{name}={value}"])]
        except (ConfigError, HydraException):
            yield ConfigIssue(key, f"={value!r} cannot be read as key=value")
            continue
        if any(one.partition(".")[0].partition("/")[0] in ITS_OWN for one in [*found, name]):
            yield ConfigIssue(key, f"={value!r} may be given on the command line only")


def _job_mistakes(own: dict[str, Any], words: Sequence[str]) -> Iterator[ConfigIssue]:
    """Files outside the run folder, and the environment of the job."""
    inside = own.get("output_subdir")
    if inside is not None and not _is_typed("hydra.output_subdir", words):
        path = PurePath(str(inside))
        if path.is_absolute() or ".." in path.parts or "${" in str(inside):
            yield ConfigIssue("hydra.output_subdir", f"={inside!r} is no folder inside the run's")
    name = own["job"].get("name")
    if not re.fullmatch(r"[\w.-]+", str(name), flags=re.ASCII) or ".." in str(name):
        yield ConfigIssue("hydra.job.name", f"={name!r} is no plain name: letters, digits, _ . -")
    for variable, value in _children(own["job"].get("env_set")):
        key = f"hydra.job.env_set.{variable}"
        if os.environ.get(variable) != value and not _is_typed(key, words):
            yield ConfigIssue(key, f"={value!r} may be given on the command line only")
        elif looks_secret(variable) and os.environ.get(variable) == value:
            yield ConfigIssue(key, " would be saved with the run; a job has the variable anyway")
