"""Mistakes in a sweep, found before it begins."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from app.config.allowlist import is_trusted, trusted_from_environment
from app.config.compose import Composer
from app.config.instantiate import iter_node_issues
from app.config.overrides import grid_issues, parse_overrides
from app.config.resolve import cli_trusted, resolve
from app.config.schema import MonitorConfig
from app.config.types import iter_issues
from app.experiment.job import make_job
from app.runtime.errors import ConfigError, ConfigIssue, as_user_error
from app.sweep.folder import SweepFolder
from app.sweep.launchers.slots import make_slots
from app.sweep.search_options import GRID_SAMPLER as GRID_SAMPLER
from app.sweep.search_options import NO_PRUNER, PRUNER_PREFIX, SAMPLER_PREFIX

GRID_SWEEPER = "hydra_plugins.app_sweeps.grid.GridSweeper"
OPTUNA_SWEEPER = "hydra_plugins.app_sweeps.search.OptunaSweeper"
POOL_LAUNCHER = "hydra_plugins.app_sweeps.pool.PoolLauncher"
BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"


def check_resume_is_multirun(composing: Composer) -> None:
    """Only a sweep goes on as one.

    Raises:
        ConfigError: `sweep.resume` is typed for a single run.
    """
    where = dict(word.partition("=")[::2] for word in composing.overrides).get(
        "sweep.resume", "null"
    )
    if where not in ("", "null") and not composing.is_sweep:
        command = f"python -m app -m {shlex.quote(f'sweep.resume={where}')}"
        raise ConfigError([ConfigIssue("sweep.resume", f"={where} needs -m, too: {command}")])


def check_sweep(composing: Composer, first: DictConfig, alone: bool) -> None:
    """Looks for mistakes.

    Args:
        composing: What is typed.
        first: Its first job.
        alone: Whether neither torchrun nor srun has started this.

    Raises:
        ConfigError: All that was found.
    """
    mistakes: list[ConfigIssue] = []
    if first.hydra.sweeper._target_ == GRID_SWEEPER:
        mistakes += grid_issues(composing.space, first.sweep.together)
    elif first.hydra.sweeper._target_ == OPTUNA_SWEEPER:
        mistakes += _search_mistakes(composing, first)
    if first.hydra.sweeper._target_ in (GRID_SWEEPER, OPTUNA_SWEEPER):
        mistakes += _folder_mistakes(first)
    launcher = first.hydra.launcher
    if not alone and launcher._target_ != BASIC_LAUNCHER:
        problem = f"={launcher._target_}: torchrun and srun run one job at a time; allowed: basic"
        mistakes.append(ConfigIssue("hydra/launcher", problem))
    if launcher._target_ == POOL_LAUNCHER:
        mistakes += _pool_mistakes(first)
    if first.sweep.resume is not None:
        mistakes += _resume_mistakes(composing, first)
    if mistakes:
        raise ConfigError(mistakes)


def _search_mistakes(composing: Composer, first: DictConfig) -> Iterator[ConfigIssue]:
    if find_spec("optuna") is None:
        install = 'pip install "torch-experiment-app[optuna]"'
        yield ConfigIssue("hydra/sweeper", f"=optuna needs the library optuna: {install}")
        return
    from app.sweep.optuna_search import iter_distribution_issues

    sweeper: Any = OmegaConf.to_container(first.hydra.sweeper, resolve=True)
    space, goal = composing.space, first.goal
    yield from iter_distribution_issues(space.swept)
    if not space.swept:
        yield ConfigIssue(
            "hydra/sweeper", "=optuna has nothing to search: no key has several values"
        )
    if first.sweep.together:
        yield ConfigIssue("sweep.together", " is for hydra/sweeper=grid")
    if sweeper["direction"] not in (None, goal.mode):
        problem = f"={sweeper['direction']!r}, but goal.mode={goal.mode!r}; allowed: {goal.mode}"
        yield ConfigIssue("hydra.sweeper.direction", problem)
    for key in ("n_trials", "n_jobs"):
        value = sweeper[key]
        if not (type(value) is int and value > 0) and not (key == "n_jobs" and value == "auto"):
            auto = " or auto" if key == "n_jobs" else ""
            yield ConfigIssue(
                f"hydra.sweeper.{key}", f"={value!r}; allowed: a number from 1 on{auto}"
            )
    if sweeper["n_jobs"] == "auto" and first.hydra.launcher._target_ not in (
        BASIC_LAUNCHER,
        POOL_LAUNCHER,
    ):
        problem = "='auto': this launcher does not say how many run at once; give a number"
        yield ConfigIssue("hydra.sweeper.n_jobs", problem)
    if sweeper["storage"] not in ("sqlite", "journal") and "://" not in sweeper["storage"]:
        problem = f"={sweeper['storage']!r}; allowed: sqlite, journal, the address of a database"
        yield ConfigIssue("hydra.sweeper.storage", problem)
    yield from _study_mistakes(composing, sweeper)


def _study_mistakes(composing: Composer, sweeper: dict[str, Any]) -> Iterator[ConfigIssue]:
    for name, objective in sweeper["objectives"].items():
        yield from iter_issues(f"hydra.sweeper.objectives.{name}", objective, MonitorConfig)
    if sweeper["objectives"] and sweeper["pruner"]["_target_"] != NO_PRUNER:
        problem = "=none is all there is where there are several objectives"
        yield ConfigIssue("hydra/sweeper/pruner", problem)
    if sweeper["sampler"]["_target_"] == GRID_SAMPLER:
        uneven = [key for key, one in composing.space.swept.items() if not one.is_discrete_sweep()]
        for key in uneven:
            yield ConfigIssue(
                key, " is an interval; hydra/sweeper/sampler=grid needs lists of values"
            )
    for key, prefix in (("sampler", SAMPLER_PREFIX), ("pruner", PRUNER_PREFIX)):
        node = sweeper[key]
        yield from iter_node_issues(f"hydra.sweeper.{key}", node, [prefix], offers=["search_space"])


def _folder_mistakes(first: DictConfig) -> Iterator[ConfigIssue]:
    key = "hydra.sweep.subdir"
    for word in first.hydra.overrides.hydra:
        if word.partition("=")[0].lstrip("+") == key:
            problem = ": the sweep names its jobs' folders itself; hydra/sweeper=basic does not"
            yield ConfigIssue(word, problem)


def _pool_mistakes(first: DictConfig) -> list[ConfigIssue]:

    launcher = first.hydra.launcher
    if first.launch not in ("auto", "local"):
        problem = f"={first.launch!r}: the pool starts a process for each job; allowed: auto, local"
        return [ConfigIssue("launch", problem)]
    for key in ("slots", "timeout"):
        value = launcher[key]
        least = 1 if key == "slots" else 0
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value not in ("auto", None) and not (number and value >= least):
            problem = f"={value!r}; allowed: a number from {least} on, auto, null"
            return [ConfigIssue(f"hydra.launcher.{key}", problem)]
    trainer: Any = OmegaConf.to_container(first.trainer, resolve=True)
    try:
        make_slots(trainer["accelerator"], trainer["devices"], launcher.slots, launcher.gpus)
    except ConfigError as error:
        return error.issues
    return []


@as_user_error("sweep.resume")
def _resume_mistakes(composing: Composer, first: DictConfig) -> list[ConfigIssue]:
    path = Path(str(first.sweep.resume)).expanduser().absolute()
    folder = SweepFolder(path)
    if not folder.exists:
        return [
            ConfigIssue("sweep.resume", f"={first.sweep.resume!r} holds no sweep: no {path}/.sweep")
        ]
    mistakes = list(iter_trust_issues(folder, composing.overrides))
    if mistakes:
        return mistakes
    with folder.locked():
        pass
    if not first.sweep.force:
        _check_frozen(composing, folder)
    base = composing.base
    HydraConfig.instance().set_config(base)
    plain, _ = resolve(base)
    if first.sweep.force:
        return []
    return [
        ConfigIssue(
            line, ": the sweep was begun so; sweep.force=true goes on with what is typed now"
        )
        for line in folder.differences(plain)
    ]


def _check_frozen(composing: Composer, folder: SweepFolder) -> None:
    """Jobs are composed of the copies that the folder has, which may be a stranger's."""
    frozen = folder.frozen_loader(composing.hydra.config_loader)
    for words in composing.space.coverage_jobs():
        composed = frozen.load_configuration(
            composing.config_name, words, RunMode.RUN, from_shell=False
        )
        HydraConfig.instance().set_config(composed)
        make_job(composed)


TRUST = "trusted_targets"
TYPED = ("hydra.job.", "hydra.job_logging", "hydra.hydra_logging", "hydra.output_subdir")
TYPED_TOO = ("hydra.searchpath", "hydra.run.", "hydra.sweep.", "hydra.overrides")


def iter_trust_issues(folder: SweepFolder, typed: Sequence[str]) -> Iterator[ConfigIssue]:
    """Saved words that would have to be typed.

    Args:
        folder: Of the sweep.
        typed: What is typed now.
    """
    now = [word for word in typed if _key(word) == TRUST]
    trusted = [*cli_trusted(parse_overrides(now)), *trusted_from_environment()]
    of_jobs = dict.fromkeys(word for job in folder.jobs for word in job.overrides)
    for word in dict.fromkeys([*folder.overrides, *of_jobs]):
        key = _key(word)
        if key == TRUST and word not in typed:
            names = cli_trusted(parse_overrides([word]))
            own = all(is_trusted(name, trusted) for name in names)
        else:
            own = word in typed or not key.startswith((TRUST, *TYPED, *TYPED_TOO))
            own = own and not (word in of_jobs and key.startswith("hydra"))
        if not own:
            problem = f": the sweep was begun with {word}; type it, too, if you trust it"
            yield ConfigIssue("sweep.resume", problem)


def _key(word: str) -> str:
    return word.partition("=")[0].strip().lstrip("+~")
