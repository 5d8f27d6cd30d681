"""From the words of a command line to a composed configuration, or to all that is wrong with them.

Hydra stops at the first wrong override and names no alternative; here all are found at once.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

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
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from app.config.allowlist import trusted_from_environment
from app.config.hydra_guard import hydra_issues
from app.config.limits import expansion_issues
from app.config.overrides import SweepSpace, parse_overrides, parse_space, raw_override
from app.config.resolve import cli_trusted
from app.config.sources import strict_sources
from app.runtime.errors import ConfigError, ConfigIssue, UserError, nearest, one_of

PACKAGE = Path(__file__).parents[1]
CONF = next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if path.is_dir())
CONFIG_NAME = "config"
EXTRAS = {  # of this program, which bring plugins of Hydra's, by the option that these add
    "hydra/launcher/joblib": "joblib",
    "hydra/launcher/submitit_local": "submitit",
    "hydra/launcher/submitit_slurm": "submitit",
    "hydra/launcher/ray": "ray",
}
# What Hydra and OmegaConf raise where a configuration is not at all as they expect.
NOT_EXPECTED = (
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
    """What composes the configurations of a command line.

    Args:
        args: What Hydra's own argument parser made of it.
    """
    with strict_sources():
        try:
            hydra = Hydra("app", SafeConfigLoader(_search_path(args)))
            GlobalHydra.instance().initialize(hydra)
            yield Composer(hydra, args.config_name or CONFIG_NAME, args.overrides, args.multirun)
        finally:
            GlobalHydra.instance().clear()


class SafeConfigLoader(ConfigLoaderImpl):
    """Composes nothing that would grow without end, or make Hydra act for a stranger."""

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        """As Hydra's.

        Raises:
            ConfigError: The configuration is refused.
        """
        trusted = [*cli_trusted(parse_overrides(overrides)), *trusted_from_environment()]
        try:
            composed = super().load_configuration(
                config_name, overrides, run_mode, from_shell, validate_sweep_overrides
            )
        except HydraException:
            raise
        except NOT_EXPECTED as error:
            told = " ".join(f"{error}".split()) or type(error).__name__
            raise ConfigCompositionException(f"it cannot be composed: {told}") from error
        # Only what does not grow is looked at, as that resolves it.
        mistakes = list(expansion_issues(composed))
        mistakes = mistakes or list(hydra_issues(composed, overrides, trusted))
        if mistakes:
            raise ConfigError(mistakes)
        return composed


def compositions(args: argparse.Namespace) -> Iterator[tuple[DictConfig, list[ConfigIssue]]]:
    """As `Composer.compositions`."""
    with open_composer(args) as composing:
        yield from composing.compositions()


class Composer:
    """Composes one command line, as a job or as the jobs of a sweep.

    Args:
        hydra: Which has found the configuration files.
        name: Of the first of them.
        words: As typed.
        multirun: Whether that is typed, too; else the configuration says.
    """

    def __init__(self, hydra: Hydra, name: str, words: Sequence[str], multirun: bool) -> None:
        self.hydra, self.config_name, self.overrides, self.multirun = hydra, name, list(words), multirun
        self.known: dict[tuple[str, ...], tuple[DictConfig, list[ConfigIssue]]] = {}

    @cached_property
    def is_sweep(self) -> bool:
        """Whether it is a sweep."""
        return self.multirun or self._unswept.hydra.mode == RunMode.MULTIRUN

    @cached_property
    def space(self) -> SweepSpace:
        """What is typed, and what of it is swept."""
        params = self._unswept.hydra.sweeper.get("params") if self.is_sweep else None
        return parse_space(self.overrides, params or {}, self.hydra.config_loader)

    @cached_property
    def base(self) -> DictConfig:
        """What all jobs of a sweep share: the configuration without what is swept.

        Raises:
            HydraException: It is none.
        """
        return self._compose(self.space.fixed)

    @cached_property
    def _unswept(self) -> DictConfig:
        """Whatever can be composed of the typed words, to see what is swept, and how."""
        composed, _ = self._composed(parse_space(self.overrides, {}, self.hydra.config_loader).fixed)
        return composed

    def compositions(self) -> Iterator[tuple[DictConfig, list[ConfigIssue]]]:
        """The configuration of the job, or of jobs that have each swept value once.

        Yields:
            What can be composed, and a mistake for every override that had to be left out.

        Raises:
            ConfigError: Nothing can be composed.
        """
        for words in self.space.coverage_jobs() if self.is_sweep else [self.overrides]:
            composed, mistakes = self._composed(words)
            HydraConfig.instance().set_config(composed)  # what ${hydra:...} is resolved against
            yield composed, mistakes

    def _composed(self, words: list[str]) -> tuple[DictConfig, list[ConfigIssue]]:
        if tuple(words) not in self.known:
            try:
                found: tuple[DictConfig, list[ConfigIssue]] = self._compose(words), []
            except UserError:
                raise
            except HydraException:
                found = _diagnose(self._compose, self.hydra.config_loader, words)
            self.known[tuple(words)] = found
        return self.known[tuple(words)]

    def _compose(self, words: list[str]) -> DictConfig:
        return self.hydra.compose_config(self.config_name, words, RunMode.RUN, False, from_shell=False)


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
    compose: Callable[[list[str]], DictConfig], loader: ConfigLoader, words: list[str]
) -> tuple[DictConfig, list[ConfigIssue]]:
    """What can be composed without the refused overrides, and what is wrong with those."""
    overrides = parse_overrides(words)
    groups = [o for o in overrides if not o.is_hydra_override() and _options(loader, o)]
    wrong = [(o, found) for o in groups if (found := _group_mistakes(loader, o))]
    refused = [o for o, _ in wrong]
    sound = [raw_override(o) for o in groups if o not in refused]
    try:
        config = compose(sound)
        keys = [*dotted_keys(config), *loader.list_groups("")]
        values = [o for o in overrides if o not in groups and not o.is_hydra_override()]
        wrong += [(o, found) for o in values if (found := [*_value_mistakes(config, o, keys)])]
        refused = [o for o, _ in wrong]
        composed = compose([raw_override(o) for o in overrides if o not in refused])
    except HydraException as error:
        raise ConfigError(
            [*(m for _, found in wrong for m in found), _as_mistake(error)]
        ) from error
    return composed, [mistake for _, found in wrong for mistake in found]


def _as_mistake(error: HydraException) -> ConfigIssue:
    reasons = [str(error)] if error.__cause__ is None else [str(error), str(error.__cause__)]
    absent = [o for o in EXTRAS if re.search(f"Could not (find|load) '{o}'", " ".join(reasons))]
    if absent:
        group, _, option = absent[0].rpartition("/")
        install = f'pip install "torch-experiment-app[{EXTRAS[absent[0]]}]"'
        return ConfigIssue(group, f"={option} is not installed: {install}")
    told = " ".join(" ".join(reasons).split())
    if found := re.search(NO_OPTION, told):
        group, option, options = found[1], found[2], found[3].split()
        problem = (
            f"={option!r} does not exist; allowed: {one_of(options)}{nearest(option, options)}"
        )
        return ConfigIssue(group, problem)
    return ConfigIssue("", told)


def _options(loader: ConfigLoader, override: Override) -> list[str]:
    return loader.get_group_options(override.key_or_group, ObjectType.CONFIG)


def _group_mistakes(loader: ConfigLoader, override: Override) -> list[ConfigIssue]:
    value = override.value()
    chosen = value if isinstance(value, list) else [value]
    options = _options(loader, override)
    return [
        ConfigIssue(
            override.key_or_group,
            f"={choice!r} does not exist; allowed: {one_of(options)}"
            f"{nearest(str(choice), options)}",
        )
        for choice in chosen
        if choice is not None and choice not in options
    ]


def _value_mistakes(
    config: DictConfig, override: Override, keys: list[str]
) -> Iterator[ConfigIssue]:
    key = override.key_or_group
    known = key in keys
    if override.is_add() and known and not isinstance(OmegaConf.select(config, key), DictConfig):
        yield ConfigIssue(f"+{key}", f" is there already; write {key}=... to change it")
    elif not override.is_add() and not override.is_force_add() and not known:
        value = "" if override.is_delete() else f"={override.value()!r}"
        yield ConfigIssue(key, f"{value} is not a known key; {_hint(config, key, keys)}")


def _hint(config: DictConfig, key: str, keys: list[str]) -> str:
    """What stands beside the unknown key, and the one most like it."""
    parent, _, last = key.rpartition(".")
    inside = OmegaConf.select(config, parent) if parent else config
    if not isinstance(inside, DictConfig):
        return f"there is no {parent!r}{nearest(key, keys)}"
    siblings = [str(k) for k in inside if k != "hydra"]
    namesakes = [known for known in keys if known.rpartition(".")[2] == last]
    close = nearest(last, siblings)
    close = close or (f"; did you mean {namesakes[0]!r}?" if namesakes else "")
    add = f"; another argument is added by +{key}=..." if "_target_" in siblings else ""
    return f"{parent or 'the configuration'} has: {one_of(siblings)}{close}{add}"


def dotted_keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """Every key of a configuration, inner ones as `outer.inner`; Hydra's own left out."""
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
