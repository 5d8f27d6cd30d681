"""From a composed configuration to what is to be run, checked."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from app.config.check import checked
from app.config.compose import Composer
from app.config.errors import ConfigError, Mistake
from app.config.freeze import freeze, over_saved, template_of, typed_trust
from app.config.rules import USES_CKPT
from app.config.schema import Config, Job
from app.config.secrets import shown
from app.config.swept import parse_overrides
from app.config.targets import trusted_by_environment
from app.config.typed import structured
from app.files import write_text

log = logging.getLogger(__name__)

AUTO = "auto"
SAID = ("name", "tags", "notes")  # to people alone
LAST = "last.pt"  # as in `app.checkpoint`, which needs torch


def jobs_of(composing: Composer) -> list[tuple[DictConfig, Job]]:
    """The job of a command line, or those of a sweep that have each value once.

    Args:
        composing: What composes their configurations.

    Returns:
        Each with what Hydra composed for it.

    Raises:
        UserError: All that is wrong with any of them.
    """
    jobs: list[tuple[DictConfig, Job]] = []
    mistakes: list[Mistake] = []
    for composed, refused in composing.compositions():
        mistakes += refused
        if composing.sweeps and composed.get("resume") is not None:
            problem = f"={composed.resume!r} is for a single run; a sweep has sweep.resume"
            mistakes.append(Mistake("resume", problem))
            continue
        try:
            jobs.append((composed, job_of(composed)))
        except ConfigError as error:
            mistakes += error.mistakes
    if mistakes:
        raise ConfigError(mistakes)
    return jobs


def job_of(composed: DictConfig, folder: Path | None = None) -> Job:
    """What is to be run.

    Args:
        composed: By Hydra, its own node included.
        folder: Of a job of a sweep; where it holds a run that was cut, that one goes on.

    Raises:
        UserError: All that is wrong with it.
    """
    words = OmegaConf.to_container(composed.hydra.overrides.task)
    assert isinstance(words, list)
    overrides = parse_overrides(words)
    trusted = [*typed_trust(overrides), *trusted_by_environment()]
    if trusted and (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    (plain, mistakes), template = freeze(composed), template_of(composed)
    mistakes += _trust_mistakes(plain, overrides)
    differences: list[str] = []
    if plain.get("mode") == "train":
        last = to_resume(composed, plain.get("resume"), folder)
        if last is not None:
            saved, its_template = _saved_config("resume", last)
            plain, template, differences = over_saved(
                saved, its_template, composed, overrides, resumes=True
            )
            plain["resume"] = last
    if plain.get("mode") in USES_CKPT and isinstance(plain.get("ckpt"), str):
        saved, its_template = _saved_config("ckpt", plain["ckpt"])
        plain, template, differences = over_saved(saved, its_template, composed, overrides)
    config = checked(plain, trusted, mistakes)
    if (given := shown(plain)) != plain:  # only the run itself is told secrets
        config = structured(given | {key: plain[key] for key in SAID}, Config)
    return Job(config, plain, OmegaConf.to_yaml(template), trusted, differences)


def prepared(composed: DictConfig, folder: Path) -> Job:
    """What is to be run in a folder, which says so from now on.

    Args:
        composed: By Hydra, its own node included.
        folder: Of the run, there already.

    Raises:
        UserError: All that is wrong with it.
    """
    job = job_of(composed, folder if composed.hydra.mode == RunMode.MULTIRUN else None)
    write_text(folder / "config.yaml", yaml.safe_dump(job.plain, sort_keys=False))
    for difference in job.differences:
        log.info("differs from the saved run: %s", difference)
    return job


def _trust_mistakes(plain: dict[str, Any], overrides: Sequence[Override]) -> list[Mistake]:
    if not plain.get("trusted_targets") or typed_trust(overrides):
        return []
    problem = f"={plain['trusted_targets']!r} may be given on the command line only"
    return [Mistake("trusted_targets", problem)]


def to_resume(composed: DictConfig, resume: str | None, folder: Path | None) -> str | None:
    """The checkpoint from which a run goes on; None where it has yet to begin.

    Raises:
        ConfigError: There is none, or the folder would be another each time.
    """
    if resume is None:
        return str(folder / "checkpoints" / LAST) if folder and _was_cut(folder) else None
    if resume == AUTO:
        raw = OmegaConf.to_container(composed.hydra.run, resolve=False)
        assert isinstance(raw, dict)
        if "${now:" in raw["dir"]:
            problem = "='auto' needs a folder that stays the same: hydra.run.dir=outputs/my_run"
            raise ConfigError([Mistake("resume", problem)])
    folder = Path(str(composed.hydra.run.dir)).expanduser().absolute()
    last = folder / "checkpoints" / LAST
    if last.exists():
        return str(last)
    if resume == AUTO:
        return None
    raise ConfigError([Mistake("resume", f"={resume!r} holds no run to go on: no {last}")])


def _was_cut(folder: Path) -> bool:
    return (folder / "checkpoints" / LAST).exists()


def _saved_config(key: str, ckpt: str) -> tuple[dict[str, Any], DictConfig]:
    if not Path(ckpt).exists():
        raise ConfigError([Mistake(key, f"={ckpt!r} does not exist")])
    from app.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(Path(ckpt))
    if checkpoint.config is None:
        problem = f"={ckpt!r} was saved by a Trainer from Python and has no configuration"
        raise ConfigError([Mistake(key, problem)])
    template = OmegaConf.create(checkpoint.template)
    assert isinstance(template, DictConfig)
    return checkpoint.config, template
