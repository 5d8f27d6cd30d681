"""Checks of a sweep before its first job starts."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from app.config.compose import Composer
from app.config.instantiate import iter_node_issues
from app.config.overrides import grid_issues, parse_overrides
from app.config.resolve import resolve
from app.config.schema import Job
from app.config.types import iter_issues
from app.experiment.job import make_job, resolve_folder
from app.runtime.errors import ConfigError, ConfigIssue, as_user_error
from app.sweep.folder import SweepFolder, config_sources
from app.sweep.launchers import BASIC_LAUNCHER, POOL_LAUNCHER
from app.sweep.launchers.options import iter_option_issues
from app.sweep.launchers.slots import make_slots
from app.sweep.resume import STORAGE_KEY, iter_trust_issues
from app.sweep.search_options import (
    EXHAUSTIVE_SAMPLER,
    NO_PRUNER,
    OWN_STORAGES,
    SearchOptions,
)

GRID_SWEEPER = "hydra_plugins.app_sweeps.grid.GridSweeper"
OPTUNA_SWEEPER = "hydra_plugins.app_sweeps.search.OptunaSweeper"
PLUGIN_KEYS = ("_target_", "_recursive_", "_convert_", "params")


def check_resume_is_multirun(composer: Composer) -> None:
    """Check that `sweep.resume` is only set for a multirun.

    Raises:
        ConfigError: `sweep.resume` is set for a single run.
    """
    pairs = dict(override.partition("=")[::2] for override in composer.overrides)
    path = pairs.get("sweep.resume", "null")
    if path not in ("", "null") and not composer.is_sweep:
        command = f"python -m app -m {shlex.quote(f'sweep.resume={path}')}"
        raise ConfigError([ConfigIssue("sweep.resume", f"={path} also needs -m: {command}")])


def check_trial_is_unset(job: Job) -> None:
    """Check that no file or command names the study of a trial, which is a database to open.

    Raises:
        ConfigError: `sweep.trial` is set.
    """
    if job.config.sweep.trial is not None:
        raise ConfigError([ConfigIssue("sweep.trial", " is set by the Optuna sweeper only")])


def check_sweep(composer: Composer, first: DictConfig, is_standalone: bool) -> None:
    """Check the settings of a sweep as a whole.

    Args:
        composer: Composes the jobs from the command line.
        first: Configuration of the first job.
        is_standalone: Whether this process was started by neither torchrun nor srun.

    Raises:
        ConfigError: Every error that was found.
    """
    issues: list[ConfigIssue] = []
    sweeper, launcher = first.hydra.sweeper._target_, first.hydra.launcher
    if sweeper == GRID_SWEEPER:
        issues += grid_issues(composer.space, first.sweep.together)
    elif sweeper == OPTUNA_SWEEPER:
        issues += _iter_search_issues(composer, first)
    if sweeper in (GRID_SWEEPER, OPTUNA_SWEEPER):
        issues += _iter_subdir_issues(first)
    elif first.sweep.resume is not None:
        problem = f"={sweeper}: sweep.resume needs one of this program; allowed: grid, optuna"
        issues.append(ConfigIssue("hydra/sweeper", problem))
    if not is_standalone and launcher._target_ != BASIC_LAUNCHER:
        problem = f"={launcher._target_}: torchrun and srun run one job at a time; allowed: basic"
        issues.append(ConfigIssue("hydra/launcher", problem))
    if launcher._target_ == POOL_LAUNCHER:
        issues += _pool_issues(first)
    elif launcher._target_ != BASIC_LAUNCHER:
        issues += iter_option_issues(launcher, parse_overrides(composer.overrides))
    if first.sweep.resume is not None:
        issues += _resume_issues(composer, first)
    if issues:
        raise ConfigError(issues)


def _iter_search_issues(composer: Composer, first: DictConfig) -> Iterator[ConfigIssue]:
    if find_spec("optuna") is None:
        install = 'pip install "torch-experiment-app[optuna]"'
        yield ConfigIssue("hydra/sweeper", f"=optuna needs the package optuna: {install}")
        return
    from app.sweep.optuna_search import iter_distribution_issues

    sweeper: Any = OmegaConf.to_container(first.hydra.sweeper, resolve=True)
    space, goal = composer.space, first.goal
    options = {name: value for name, value in sweeper.items() if name not in PLUGIN_KEYS}
    yield from iter_issues("hydra.sweeper", options, SearchOptions)
    distribution_issues = list(iter_distribution_issues(space.swept))
    yield from distribution_issues or _iter_interval_issues(composer, sweeper)
    if not space.swept:
        yield ConfigIssue(
            "hydra/sweeper", "=optuna has nothing to search: no key has several values"
        )
    if first.sweep.together:
        yield ConfigIssue("sweep.together", " only applies to hydra/sweeper=grid")
    if sweeper["direction"] not in (None, goal.mode):
        problem = f"={sweeper['direction']!r}, but goal.mode={goal.mode!r}; allowed: {goal.mode}"
        yield ConfigIssue("hydra.sweeper.direction", problem)
    is_known_launcher = first.hydra.launcher._target_ in (BASIC_LAUNCHER, POOL_LAUNCHER)
    if sweeper["n_jobs"] == "auto" and not is_known_launcher:
        problem = "='auto': this launcher does not report how many jobs it runs; set a number"
        yield ConfigIssue("hydra.sweeper.n_jobs", problem)
    yield from _iter_storage_issues(sweeper["storage"], composer.overrides)
    yield from _iter_study_issues(sweeper)


def _iter_storage_issues(storage: object, overrides: Sequence[str]) -> Iterator[ConfigIssue]:
    """Check where the study is; a database that a file names may be a stranger's."""
    if storage in OWN_STORAGES:
        return
    if "://" not in str(storage):
        problem = f"={storage!r}; allowed: sqlite, journal, a database URL"
        yield ConfigIssue(STORAGE_KEY, problem)
    elif STORAGE_KEY not in [override.key_or_group for override in parse_overrides(overrides)]:
        problem = f"={storage!r}: a database can only be named on the command line"
        yield ConfigIssue(STORAGE_KEY, problem)


def _iter_study_issues(sweeper: dict[str, Any]) -> Iterator[ConfigIssue]:
    if sweeper["objectives"] and sweeper["pruner"]["_target_"] != NO_PRUNER:
        problem = ": Optuna cannot prune trials with several objectives; allowed: none"
        yield ConfigIssue("hydra/sweeper/pruner", problem)
    for key in ("sampler", "pruner"):
        yield from iter_node_issues(f"hydra.sweeper.{key}", sweeper[key], ())


def _iter_interval_issues(composer: Composer, sweeper: dict[str, Any]) -> Iterator[ConfigIssue]:
    """Yield the keys that a sampler of all combinations cannot search."""
    from app.sweep.optuna_search import parse_search_space

    if sweeper["sampler"]["_target_"] != EXHAUSTIVE_SAMPLER:
        return
    for key, distribution in parse_search_space(composer.space.swept).distributions.items():
        if getattr(distribution, "step", 1) is None:
            problem = " is an interval; hydra/sweeper/sampler=grid needs lists of values"
            yield ConfigIssue(key, problem)


def _iter_subdir_issues(first: DictConfig) -> Iterator[ConfigIssue]:
    overrides: Any = OmegaConf.to_container(first.hydra.overrides.hydra, resolve=False)
    for override in overrides:
        if override.partition("=")[0].lstrip("+") == "hydra.sweep.subdir":
            problem = ": this sweeper names the job folders itself; hydra/sweeper=basic does not"
            yield ConfigIssue(override, problem)


def _pool_issues(first: DictConfig) -> list[ConfigIssue]:
    launcher = first.hydra.launcher
    if first.launch not in ("auto", "local"):
        problem = f"={first.launch!r}: the pool starts a process for each job; allowed: auto, local"
        return [ConfigIssue("launch", problem)]
    for key, minimum in (("slots", 1), ("timeout", 0)):
        value = launcher[key]
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value not in ("auto", None) and not (is_number and value >= minimum):
            problem = f"={value!r}; allowed: a number >= {minimum}, auto, null"
            return [ConfigIssue(f"hydra.launcher.{key}", problem)]
    trainer: Any = OmegaConf.to_container(first.trainer, resolve=True)
    try:
        make_slots(trainer["accelerator"], trainer["devices"], launcher.slots, launcher.gpus)
    except ConfigError as error:
        return error.issues
    return []


@as_user_error("sweep.resume")
def _resume_issues(composer: Composer, first: DictConfig) -> list[ConfigIssue]:
    path = Path(str(first.sweep.resume)).expanduser().absolute()
    folder = SweepFolder(path)
    if not folder.exists:
        problem = f"={first.sweep.resume!r} is not the folder of a sweep: there is no {path}/.sweep"
        return [ConfigIssue("sweep.resume", problem)]
    issues = list(iter_trust_issues(folder, composer.overrides))
    if resolve_folder(first, "hydra.sweep.dir") != path:
        problem = f"={first.hydra.sweep.dir!r} is not the folder to resume, {str(path)!r}"
        issues.append(ConfigIssue("hydra.sweep.dir", problem))
    if issues:
        return issues
    with folder.locked():
        pass
    if first.sweep.force:
        return []
    _check_frozen_configs(composer, folder)
    HydraConfig.instance().set_config(composer.base)
    plain, _ = resolve(composer.base)
    problem = ": changed since the sweep was started; sweep.force=true uses the new configuration"
    return [ConfigIssue(line, problem) for line in folder.differences(plain)]


def _check_frozen_configs(composer: Composer, folder: SweepFolder) -> None:
    """Check jobs composed from the configuration files in the sweep's folder.

    The folder may come from somebody else, so its files are not trusted.
    """
    loader = composer.hydra.config_loader
    frozen = folder.frozen_loader(loader)
    if config_sources(loader) == config_sources(frozen):
        return  # these jobs have been checked
    for overrides in composer.space.coverage_jobs():
        composed = frozen.load_configuration(
            composer.config_name, overrides, RunMode.RUN, from_shell=False
        )
        HydraConfig.instance().set_config(composed)
        make_job(composed)
