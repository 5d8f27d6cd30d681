"""Compose the configuration of a command line, and report all of its wrong overrides.

Hydra stops at the first wrong override and suggests no alternative; here all are found at once.
"""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException
from hydra.types import RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from app.config.allowlist import trusted_from_environment
from app.config.hydra_guard import hydra_issues
from app.config.limits import expansion_issues
from app.config.overrides import SweepSpace, make_space, parse_overrides, raw_override
from app.config.resolve import cli_trusted
from app.config.sources import strict_sources
from app.runtime.errors import ConfigError, ConfigIssue, UserError, did_you_mean, join_choices

PACKAGE = Path(__file__).parents[1]
CONF = next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if path.is_dir())
CONFIG_NAME = "config"
EXTRA_BY_OPTION = {  # extras of this package that install the Hydra plugin of an option
    "hydra/launcher/joblib": "joblib",
    "hydra/launcher/submitit_local": "submitit",
    "hydra/launcher/submitit_slurm": "submitit",
    "hydra/launcher/ray": "ray",
}
# Raised by Hydra and OmegaConf for configurations of a shape that they do not expect.
COMPOSE_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    OSError,
    RecursionError,
)
NO_OPTION = r"Could not find '([^']+)/([^/']+)' Available options in '[^']+': (.*) Config search"


@contextmanager
def open_composer(args: argparse.Namespace) -> Iterator[Composer]:
    """Initialize Hydra and yield the `Composer` of a command line.

    Args:
        args: Command line as parsed by Hydra's argument parser.
    """
    with strict_sources():
        try:
            hydra = Hydra("app", SafeConfigLoader(_search_path(args)))
            GlobalHydra.instance().initialize(hydra)
            yield Composer(hydra, args.config_name or CONFIG_NAME, args.overrides, args.multirun)
        finally:
            GlobalHydra.instance().clear()


class SafeConfigLoader(ConfigLoaderImpl):
    """Config loader that refuses unbounded configurations and unsafe Hydra settings.

    It remembers the last configuration, so that what has been checked is not composed again to run.
    """

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        super().__init__(config_search_path)
        self._last: tuple[Any, DictConfig] | None = None

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        """Compose a configuration and check it.

        Raises:
            ConfigError: The configuration expands without bound, or has Hydra settings that are
                not allowed.
        """
        request = (config_name, list(overrides), run_mode)
        if self._last is None or self._last[0] != request:
            composed = self._compose(
                config_name, overrides, run_mode, from_shell, validate_sweep_overrides
            )
            self._last = request, composed
        return copy.deepcopy(self._last[1])

    def _compose(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool,
        validate_sweep_overrides: bool,
    ) -> DictConfig:
        parsed = parse_overrides(overrides)
        trusted = [*cli_trusted(parsed), *trusted_from_environment()]
        try:
            composed = super().load_configuration(
                config_name, overrides, run_mode, from_shell, validate_sweep_overrides
            )
        except HydraException:
            raise
        except COMPOSE_ERRORS as error:
            reason = " ".join(f"{error}".split()) or type(error).__name__
            message = f"the configuration cannot be composed: {reason}"
            raise ConfigCompositionException(message) from error
        # The second check resolves values, so it runs only if they are bounded.
        issues = list(expansion_issues(composed))
        issues = issues or list(hydra_issues(composed, parsed, trusted))
        if issues:
            raise ConfigError(issues)
        return composed


def compositions(args: argparse.Namespace) -> Iterator[tuple[DictConfig, list[ConfigIssue]]]:
    """Yield the compositions of a command line, see `Composer.compositions`."""
    with open_composer(args) as composer:
        yield from composer.compositions()


class Composer:
    """Composes the configuration of one command line: of a single job, or of a sweep.

    Args:
        hydra: Initialized Hydra with its config search path.
        config_name: Name of the primary configuration file.
        overrides: Overrides from the command line.
        multirun: Whether `--multirun` is set; otherwise `hydra.mode` decides.
    """

    def __init__(
        self, hydra: Hydra, config_name: str, overrides: Sequence[str], multirun: bool
    ) -> None:
        self.hydra, self.config_name = hydra, config_name
        self.overrides, self.multirun = list(overrides), multirun
        self._parsed = parse_overrides(overrides, hydra.config_loader)
        self._fixed_overrides = make_space(self._parsed, {}).fixed

    @cached_property
    def is_sweep(self) -> bool:
        config, _ = self._fixed
        return self.multirun or config.hydra.mode == RunMode.MULTIRUN

    @cached_property
    def space(self) -> SweepSpace:
        """Overrides of the command line and of `hydra.sweeper.params`, and which are swept."""
        config, _ = self._fixed
        params = config.hydra.sweeper.get("params") if self.is_sweep else None
        return make_space(self._parsed, params or {}, self.hydra.config_loader)

    @cached_property
    def base(self) -> DictConfig:
        """Configuration shared by all jobs of a sweep, composed without the swept overrides.

        Raises:
            HydraException: It cannot be composed.
        """
        return self._compose(self.space.fixed)

    @cached_property
    def _fixed(self) -> tuple[DictConfig, list[ConfigIssue]]:
        """Best-effort composition without swept overrides, to read the sweep's own settings."""
        return self._compose_or_diagnose(self._fixed_overrides)

    def compositions(self) -> Iterator[tuple[DictConfig, list[ConfigIssue]]]:
        """Compose the job, or jobs that together use each value of a sweep once.

        Yields:
            The composed configuration, and an issue for each override that had to be left out.

        Raises:
            ConfigError: Nothing can be composed.
        """
        for overrides in self.space.coverage_jobs() if self.is_sweep else [self.overrides]:
            is_fixed = overrides == self._fixed_overrides
            composed, issues = self._fixed if is_fixed else self._compose_or_diagnose(overrides)
            HydraConfig.instance().set_config(composed)  # for ${hydra:...} interpolations
            yield composed, issues

    def run(self, task: TaskFunction) -> None:
        """Let Hydra run the job, or its sweeper run all jobs."""
        if not self.is_sweep:
            self.hydra.run(self.config_name, task, self.overrides)
            return
        config, _ = self._fixed
        is_set = config.hydra.mode == RunMode.MULTIRUN
        mode = [] if is_set else ["hydra.mode=MULTIRUN"]
        self.hydra.multirun(self.config_name, task, [*self.overrides, *mode])

    def _compose_or_diagnose(self, overrides: list[str]) -> tuple[DictConfig, list[ConfigIssue]]:
        try:
            return self._compose(overrides), []
        except UserError:
            raise
        except HydraException:
            return _diagnose(self._compose, self.hydra.config_loader, overrides)

    def _compose(self, overrides: list[str]) -> DictConfig:
        return self.hydra.compose_config(self.config_name, overrides, RunMode.RUN, from_shell=False)


def _search_path(args: argparse.Namespace) -> ConfigSearchPath:
    path = create_config_search_path(str(Path(args.config_path or CONF).absolute()))
    if args.config_dir is not None:
        folder = Path(args.config_dir).absolute()
        if not folder.is_dir():
            raise ConfigError(
                [ConfigIssue("--config-dir", f" {args.config_dir!r} is not a folder")]
            )
        assert isinstance(path, ConfigSearchPathImpl)
        path.prepend("command-line", f"file://{folder}", SearchPathQuery(provider="schema"))
    return path


def _diagnose(
    compose: Callable[[list[str]], DictConfig], loader: ConfigLoader, texts: list[str]
) -> tuple[DictConfig, list[ConfigIssue]]:
    """Compose without the invalid overrides, and return what is wrong with those."""
    overrides = parse_overrides(texts)
    groups = [o for o in overrides if not o.is_hydra_override() and _options(loader, o)]
    invalid = [(o, issues) for o in groups if (issues := _group_issues(loader, o))]
    rejected = [o for o, _ in invalid]
    valid_groups = [raw_override(o) for o in groups if o not in rejected]
    try:
        config = compose(valid_groups)
        keys = [*dotted_keys(config), *loader.list_groups("")]
        values = [o for o in overrides if o not in groups and not o.is_hydra_override()]
        invalid += [(o, issues) for o in values if (issues := [*_value_issues(config, o, keys)])]
        rejected = [o for o, _ in invalid]
        composed = compose([raw_override(o) for o in overrides if o not in rejected])
    except HydraException as error:
        raise ConfigError(
            [*(issue for _, issues in invalid for issue in issues), _as_issue(error)]
        ) from error
    return composed, [issue for _, issues in invalid for issue in issues]


def _options(loader: ConfigLoader, override: Override) -> list[str]:
    return loader.get_group_options(override.key_or_group, ObjectType.CONFIG)


def _group_issues(loader: ConfigLoader, override: Override) -> list[ConfigIssue]:
    value = override.value()
    chosen = value if isinstance(value, list) else [value]
    options = _options(loader, override)
    return [
        ConfigIssue(
            override.key_or_group,
            f"={choice!r} does not exist; allowed: {join_choices(options)}"
            f"{did_you_mean(str(choice), options)}",
        )
        for choice in chosen
        if choice is not None and choice not in options
    ]


def _value_issues(config: DictConfig, override: Override, keys: list[str]) -> Iterator[ConfigIssue]:
    key = override.key_or_group
    exists = key in keys
    if override.is_add() and exists and not isinstance(OmegaConf.select(config, key), DictConfig):
        yield ConfigIssue(f"+{key}", f" already exists; use {key}=... to change it")
    elif not override.is_add() and not override.is_force_add() and not exists:
        value = "" if override.is_delete() else f"={override.value()!r}"
        yield ConfigIssue(key, f"{value} is not a known key; {_hint(config, key, keys)}")


def _hint(config: DictConfig, key: str, keys: list[str]) -> str:
    """Return the valid keys next to an unknown key, and the nearest match."""
    parent, _, last = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    if not isinstance(node, DictConfig):
        return f"there is no {parent!r}{did_you_mean(key, keys)}"
    siblings = [str(name) for name in node if name != "hydra"]
    same_name = [candidate for candidate in keys if candidate.rpartition(".")[2] == last]
    close = did_you_mean(last, siblings)
    close = close or (f"; did you mean {same_name[0]!r}?" if same_name else "")
    add = f"; to add an argument use +{key}=..." if "_target_" in siblings else ""
    return f"{parent or 'the configuration'} has: {join_choices(siblings)}{close}{add}"


def _as_issue(error: HydraException) -> ConfigIssue:
    reasons = [str(error)] if error.__cause__ is None else [str(error), str(error.__cause__)]
    missing = [
        option
        for option in EXTRA_BY_OPTION
        if re.search(f"Could not (find|load) '{option}'", " ".join(reasons))
    ]
    if missing:
        group, _, option = missing[0].rpartition("/")
        install = f'pip install "torch-experiment-app[{EXTRA_BY_OPTION[missing[0]]}]"'
        return ConfigIssue(group, f"={option} is not installed: {install}")
    message = " ".join(" ".join(reasons).split())
    if match := re.search(NO_OPTION, message):
        group, option, options = match[1], match[2], match[3].split()
        allowed = f"{join_choices(options)}{did_you_mean(option, options)}"
        return ConfigIssue(group, f"={option!r} does not exist; allowed: {allowed}")
    return ConfigIssue("", message)


def dotted_keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """Yield every key of a configuration, nested ones as `outer.inner`, without `hydra`."""
    for name in config:
        if name == "hydra" and not prefix:
            continue
        yield f"{prefix}{name!s}"
        try:
            child = config._get_node(name)
        except OmegaConfBaseException:
            continue
        if isinstance(child, DictConfig) and not (child._is_none() or child._is_missing()):
            yield from dotted_keys(child, f"{prefix}{name!s}.")
