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

from app.config.allowlist import check_targets_allowed, trusted_by_environment
from app.config.compose import Composer
from app.config.overrides import parse_overrides
from app.config.resolve import cli_trusted, resolve, unresolved
from app.config.resume import apply_overrides_to_saved
from app.config.rules import USES_CKPT
from app.config.schema import Job
from app.config.secrets import reveal, reveal_config, unexpected_env_reads
from app.config.template import safe_template
from app.config.types import MISSING, UNKNOWN
from app.config.validate import validate
from app.runtime.errors import ConfigError, ConfigIssue, UserError, as_user_error
from app.runtime.files import write_text
from app.training.checkpoint.checksum import verify_checksum
from app.training.checkpoint.rotation import FOLDER, LAST, latest_valid

log = logging.getLogger(__name__)

AUTO = "auto"
SAID = ("name", "tags", "notes")  # to people alone
PLACES = {  # keys that name a folder or a file
    "resume": "null, auto, a run folder, a state in one",
    "ckpt": "null, a run folder, a checkpoint file",
    "sweep.resume": "null, the folder of a sweep",
}


def make_jobs(composing: Composer) -> list[tuple[DictConfig, Job]]:
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
            jobs.append((composed, make_job(composed)))
        except ConfigError as error:
            mistakes += error.issues
    if mistakes:
        raise ConfigError(mistakes)
    return jobs


def make_job(composed: DictConfig, folder: Path | None = None) -> Job:
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
    trusted = [*cli_trusted(overrides), *trusted_by_environment()]
    if trusted and (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    (plain, mistakes), template = resolve(composed), unresolved(composed)
    mistakes += [*_trust_mistakes(plain, overrides), *_place_mistakes(plain)]
    today = plain
    differences: list[str] = []
    damaged: list[str] = []
    if plain.get("mode") == "train":
        try:
            with as_user_error("resume"):
                last, damaged = resolve_resume(composed, plain.get("resume"), folder)
        except ConfigError as error:
            raise ConfigError([*mistakes, *error.issues]) from error
        if last is not None:
            saved, its_template = _saved_config("resume", str(last))
            plain, template, differences = apply_overrides_to_saved(
                saved, its_template, composed, overrides, resumes=True
            )
            plain["resume"] = str(last)
            check_targets_allowed(str(last), plain, trusted)
    if plain.get("mode") in USES_CKPT and plain.get("ckpt") not in (None, UNKNOWN):
        saved, its_template = _saved_config("ckpt", plain["ckpt"])
        plain, template, differences = apply_overrides_to_saved(
            saved, its_template, composed, overrides
        )
        check_targets_allowed(plain["ckpt"], plain, trusted)
    mistakes += unexpected_env_reads(plain, today)
    config = validate(plain, trusted, mistakes)
    if reveal(plain) != plain:  # only the run itself is told secrets
        config = reveal_config(plain)
    return Job(config, plain, OmegaConf.to_yaml(template), trusted, differences, damaged)


def prepare(composed: DictConfig, folder: Path) -> Job:
    """What is to be run in a folder, which says so from now on.

    Args:
        composed: By Hydra, its own node included.
        folder: Of the run, there already.

    Raises:
        UserError: All that is wrong with it.
    """
    job = make_job(composed, folder if composed.hydra.mode == RunMode.MULTIRUN else None)
    write_text(folder / "config.yaml", yaml.safe_dump(job.plain, sort_keys=False))
    for problem in job.damaged:
        log.warning("%s; going on from %s", problem, job.config.resume)
    for difference in job.differences:
        log.warning("differs from the saved run: %s", difference)
    return job


def has_longer_schedule(job: Job) -> bool:
    """Whether a run that goes on has another length than it had."""
    keys = ("trainer.max_epochs", "trainer.max_steps", "trainer.max_time", "goal.")
    return any(line.startswith(keys) for line in job.differences)


def _trust_mistakes(plain: dict[str, Any], overrides: Sequence[Override]) -> list[ConfigIssue]:
    if not plain.get("trusted_targets") or cli_trusted(overrides):
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


def resolve_folder(composed: DictConfig, key: str) -> Path:
    """The absolute folder that `hydra.run.dir` or `hydra.sweep.dir` names.

    Raises:
        ConfigError: It names none.
    """
    return Path(str(hydra_value(composed, key))).absolute()


def hydra_value(composed: DictConfig, key: str) -> Any:
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


def resolve_resume(
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
    folder = resolve_folder(composed, "hydra.run.dir")
    if resume.endswith(".pt"):
        return _chosen(resume, folder), []
    last, damaged = _newest(folder)
    if last is None and resume != AUTO:
        problem = f"={resume!r} holds no run to go on: no {folder / FOLDER / LAST}"
        raise ConfigError([ConfigIssue("resume", problem)])
    return last, damaged


def _newest(folder: Path) -> tuple[Path | None, list[str]]:
    last, damaged = latest_valid(folder)
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
        kind = verify_checksum(file).kind
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
