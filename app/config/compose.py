"""Compose the configuration of a command line."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException
from hydra.types import RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf

from app.config import resolvers
from app.config.allowlist import trusted_from_environment
from app.config.diagnose import diagnose
from app.config.hydra_guard import hydra_issues
from app.config.limits import limited_interpolations, resolution_budget
from app.config.overrides import SweepSpace, make_space, parse_overrides
from app.config.resolve import cli_trusted
from app.config.secrets import hidden_secrets
from app.config.sources import strict_sources
from app.runtime.errors import ConfigError, ConfigIssue, UserError

PACKAGE = Path(__file__).parents[1]
CONF = next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if path.is_dir())
CONFIG_NAME = "config"
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


@contextmanager
def open_composer(args: argparse.Namespace) -> Iterator[Composer]:
    """Initialize Hydra and yield the `Composer` of a command line.

    Args:
        args: Command line as parsed by Hydra's argument parser.
    """
    resolvers.register()
    with strict_sources(), limited_interpolations(), hidden_secrets():
        try:
            hydra = Hydra("app", SafeConfigLoader(_search_path(args)))
            GlobalHydra.instance().initialize(hydra)
            yield Composer(hydra, args.config_name or CONFIG_NAME, args.overrides, args.multirun)
        finally:
            GlobalHydra.instance().clear()


class SafeConfigLoader(ConfigLoaderImpl):
    """Config loader that refuses configurations that grow too large and unsafe Hydra settings.

    It remembers the last configuration, so that what has been checked is not composed again to run.
    """

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        super().__init__(config_search_path)
        self._last_request: object = None
        self._last = OmegaConf.create()

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
            ConfigError: It is too large to compose, or has Hydra settings that are not allowed.
        """
        request = (config_name, tuple(overrides), run_mode)
        if request != self._last_request:
            parsed = parse_overrides(overrides)
            # A launcher may compose in another process, where no composer is open.
            with resolution_budget(), hidden_secrets(), _compose_errors():
                composed = super().load_configuration(
                    config_name, overrides, run_mode, from_shell, validate_sweep_overrides
                )
            _check_composed(composed, parsed)
            self._last, self._last_request = composed, request
        return copy.deepcopy(self._last)

    def get_group_options(
        self,
        group_name: str,
        results_filter: ObjectType | None = ObjectType.CONFIG,
        config_name: str | None = None,
        overrides: list[str] | None = None,
    ) -> list[str]:
        """List the options of a group; Hydra would copy its whole search path for each group."""
        if config_name or overrides:
            return super().get_group_options(group_name, results_filter, config_name, overrides)
        return self.repository.get_group_options(group_name, results_filter)


@contextmanager
def _compose_errors() -> Iterator[None]:
    """Turn what Hydra and OmegaConf raise for files of an unexpected shape into one error."""
    try:
        yield
    except HydraException:
        raise
    except COMPOSE_ERRORS as error:
        reason = " ".join(f"{error}".split()) or type(error).__name__
        message = f"the configuration cannot be composed: {reason}"
        raise ConfigCompositionException(message) from error


def _check_composed(composed: DictConfig, overrides: Sequence[Override]) -> None:
    trusted = [*cli_trusted(overrides), *trusted_from_environment()]
    if issues := list(hydra_issues(composed, overrides, trusted)):
        raise ConfigError(issues)


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
            parsed = parse_overrides(overrides)
            return diagnose(self._compose, self.hydra.config_loader, parsed)

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
