"""From a composed configuration to what is to be run, checked."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from app.config.allowlist import refuse_strangers, trusted_by_environment
from app.config.compose import Composer
from app.config.overrides import parse_overrides
from app.config.resolve import freeze, template_of, typed_trust
from app.config.resume import over_saved
from app.config.rules import USES_CKPT
from app.config.schema import Job
from app.config.secrets import shown, told, unasked
from app.config.template import safe_template
from app.config.types import MISSING, UNKNOWN
from app.config.validate import checked
from app.runtime.errors import ConfigError, ConfigIssue, UserError, as_user_error
from app.runtime.files import write_text
from app.training.checkpoint.checksum import check_seal
from app.training.checkpoint.rotation import FOLDER, LAST, newest_sound

log = logging.getLogger(__name__)

AUTO = "auto"
SAID = ("name", "tags", "notes")  # to people alone
PLACES = {  # keys that name a folder or a file
    "resume": "null, auto, a run folder, a state in one",
    "ckpt": "null, a run folder, a checkpoint file",
    "sweep.resume": "null, the folder of a sweep",
}


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
    mistakes: list[ConfigIssue] = []
    for composed, refused in composing.compositions():
        mistakes += refused
        if composing.sweeps and composed.get("resume") is not None:
            problem = f"={composed.resume!r} is for a single run; a sweep has sweep.resume"
            mistakes.append(ConfigIssue("resume", problem))
            continue
        try:
            jobs.append((composed, job_of(composed)))
        except ConfigError as error:
            mistakes += error.issues
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
    mistakes += [*_trust_mistakes(plain, overrides), *_place_mistakes(plain)]
    today = plain
    differences: list[str] = []
    damaged: list[str] = []
    if plain.get("mode") == "train":
        try:
            with as_user_error("resume"):
                last, damaged = to_resume(composed, plain.get("resume"), folder)
        except ConfigError as error:
            raise ConfigError([*mistakes, *error.issues]) from error
        if last is not None:
            saved, its_template = _saved_config("resume", str(last))
            plain, template, differences = over_saved(
                saved, its_template, composed, overrides, resumes=True
            )
            plain["resume"] = str(last)
            refuse_strangers(str(last), plain, trusted)
    if plain.get("mode") in USES_CKPT and plain.get("ckpt") not in (None, UNKNOWN):
        saved, its_template = _saved_config("ckpt", plain["ckpt"])
        plain, template, differences = over_saved(saved, its_template, composed, overrides)
        refuse_strangers(plain["ckpt"], plain, trusted)
    mistakes += unasked(plain, today)
    config = checked(plain, trusted, mistakes)
    if shown(plain) != plain:  # only the run itself is told secrets
        config = told(plain)
    return Job(config, plain, OmegaConf.to_yaml(template), trusted, differences, damaged)


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
    for problem in job.damaged:
        log.warning("%s; going on from %s", problem, job.config.resume)
    for difference in job.differences:
        log.warning("differs from the saved run: %s", difference)
    return job


def is_longer(job: Job) -> bool:
    """Whether a run that goes on has another length than it had."""
    keys = ("trainer.max_epochs", "trainer.max_steps", "trainer.max_time", "goal.")
    return any(line.startswith(keys) for line in job.differences)


def _trust_mistakes(plain: dict[str, Any], overrides: Sequence[Override]) -> list[ConfigIssue]:
    if not plain.get("trusted_targets") or typed_trust(overrides):
        return []
    problem = f"={plain['trusted_targets']!r} may be given on the command line only"
    return [ConfigIssue("trusted_targets", problem)]


def _place_mistakes(plain: dict[str, Any]) -> Iterator[ConfigIssue]:
    """What is no path; it becomes unknown, so that nothing more is said of it."""
    for key, allowed in PLACES.items():
        group, _, name = key.rpartition(".")
        inside: Any = plain.get(group) if group else plain
        value = inside.get(name) if isinstance(inside, dict) else None
        if value is not None and (not isinstance(value, str) or value == ""):
            yield ConfigIssue(key, f"={value!r}: allowed: {allowed}")
            inside[name] = UNKNOWN


def folder_of(composed: DictConfig, key: str) -> Path:
    """The absolute folder that `hydra.run.dir` or `hydra.sweep.dir` names.

    Raises:
        ConfigError: It names none.
    """
    return Path(str(value_of(composed, key))).absolute()


def value_of(composed: DictConfig, key: str) -> Any:
    """What a key of Hydra's own holds.

    Raises:
        ConfigError: Nothing, or it does not resolve.
    """
    try:
        return OmegaConf.select(composed, key, throw_on_missing=True)
    except MissingMandatoryValue as error:
        problem = f" has no value; give one, as {key}=outputs/my_run"
        raise ConfigError([ConfigIssue(key, problem)]) from error
    except OmegaConfBaseException as error:
        problem = f" does not resolve: {str(error).splitlines()[0]}"
        raise ConfigError([ConfigIssue(key, problem)]) from error


def to_resume(
    composed: DictConfig, resume: str | None, folder: Path | None
) -> tuple[Path | None, list[str]]:
    """The state from which a run goes on; None where it has yet to begin.

    Args:
        composed: By Hydra.
        resume: As typed: a run folder, a state in one, `auto`.
        folder: Of a job of a sweep.

    Returns:
        Its file, and what is wrong with newer ones.

    Raises:
        ConfigError: There is none, or the folder would be another each time.
    """
    if resume in (UNKNOWN, MISSING):
        return None, []
    if resume is None:
        return _newest(folder) if folder else (None, [])
    if resume == AUTO:
        raw = OmegaConf.to_container(composed.hydra.run, resolve=False)
        assert isinstance(raw, dict)
        if "${now:" in raw["dir"]:
            problem = "='auto' needs a folder that stays the same: hydra.run.dir=outputs/my_run"
            raise ConfigError([ConfigIssue("resume", problem)])
    folder = folder_of(composed, "hydra.run.dir")
    if resume.endswith(".pt"):
        return _chosen(resume, folder), []
    last, damaged = _newest(folder)
    if last is None and resume != AUTO:
        problem = f"={resume!r} holds no run to go on: no {folder / FOLDER / LAST}"
        raise ConfigError([ConfigIssue("resume", problem)])
    return last, damaged


def _newest(folder: Path) -> tuple[Path | None, list[str]]:
    last, damaged = newest_sound(folder)
    if last is None and damaged:
        raise ConfigError([ConfigIssue("resume", f": {problem}") for problem in damaged])
    return last, damaged


def _chosen(resume: str, folder: Path) -> Path:
    """A state that the user has named himself."""
    file = Path(resume).expanduser().absolute()
    if file.parent != folder / FOLDER:
        problem = f"={resume!r} is no state of the run in {folder}: it lies elsewhere"
        raise ConfigError([ConfigIssue("resume", problem)])
    try:
        kind = check_seal(file).kind
    except UserError as error:
        raise ConfigError([ConfigIssue("resume", f": {error}")]) from error
    if kind != "state":
        problem = f"={resume!r} holds weights alone; training goes on from a {LAST}"
        raise ConfigError([ConfigIssue("resume", problem)])
    return file


def _saved_config(key: str, ckpt: str) -> tuple[dict[str, Any], DictConfig]:
    from app.training.checkpoint.checkpoint import load_checkpoint

    with as_user_error(key):
        if not Path(ckpt).exists():
            raise ConfigError([ConfigIssue(key, f"={ckpt!r} does not exist")])
        checkpoint = load_checkpoint(Path(ckpt))
    if checkpoint.config is None:
        problem = f"={ckpt!r} was saved by a Trainer from Python and has no configuration"
        raise ConfigError([ConfigIssue(key, problem)])
    return checkpoint.config, safe_template(checkpoint.template, checkpoint.config, ckpt)
