"""Turn a composed configuration into a validated job, and decide what a job resumes from."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from app.config.allowlist import trusted_from_environment
from app.config.compose import Composer
from app.config.limits import MAX_FILE_BYTES
from app.config.overrides import parse_overrides
from app.config.resolve import cli_trusted, get_by_path, resolve
from app.config.resume import apply_overrides_to_saved, find_overridden
from app.config.rules import CKPT_MODES
from app.config.saved import (
    LITERAL_START,
    QUOTE,
    SavedConfig,
    check_saved,
    half_resolve,
    resolve_saved,
)
from app.config.schema import AUTO, Change, Job
from app.config.secrets import reveal, reveal_config, unexpected_env_reads
from app.config.types import MISSING, UNKNOWN
from app.config.validate import validate
from app.experiment.data_facts import read_data, with_data_facts
from app.experiment.teacher import Teacher, config_issues, mismatch_issues, read_teacher
from app.runtime.errors import ConfigError, ConfigIssue, UserError, as_user_error
from app.runtime.files import read_status, write_text
from app.runtime.lock import check_unlocked
from app.runtime.small_files import parse_json, read_small_file
from app.training.checkpoint.header import verify_checksum
from app.training.checkpoint.rotation import CHECKPOINT_DIR, LAST_CHECKPOINT, SUFFIX, latest_valid
from app.training.checkpoint.weights_file import (
    ALLOWED,
    WeightsFormat,
    find_weights_file,
    read_format,
)

log = logging.getLogger(__name__)

# In the folder of checkpoints: what a run was started with, for a restart before the first one.
START_CONFIG = "start.json"
PATH_KEYS = {  # keys that name a folder or a file, and what they allow
    "resume": "null, auto, a run folder, a training checkpoint in one",
    "ckpt": "null, a run folder, a checkpoint file",
    "teacher": "null, a run folder, a checkpoint file",
    "init.weights": f"null, {ALLOWED}",
    "sweep.resume": "null, the folder of a sweep",
}


def make_jobs(composer: Composer) -> list[tuple[DictConfig, Job]]:
    """Make the job of a command line; of a sweep, enough jobs to check each value once.

    Args:
        composer: Composes the configurations.

    Returns:
        Pairs of the configuration that Hydra composed and its job.

    Raises:
        UserError: All errors in all of the configurations.
    """
    jobs: list[tuple[DictConfig, Job]] = []
    issues: list[ConfigIssue] = []
    for composed, override_issues in composer.compositions():
        issues += override_issues
        if composer.is_sweep and composed.get("resume") is not None:
            problem = f"={composed.resume!r} is for a single run; use sweep.resume for a sweep"
            issues.append(ConfigIssue("resume", problem))
            continue
        try:
            _check_not_in_use(composed)  # before anything is asked about the run
            jobs.append((composed, make_job(composed, has_errors=bool(override_issues))))
        except ConfigError as error:
            issues += error.issues
    if issues:
        raise ConfigError(issues)
    return jobs


def _check_not_in_use(composed: DictConfig) -> None:
    """Check that no process uses the run to resume."""
    try:
        is_resumed = composed.get("resume") is not None
        folder = resolve_folder(composed, "hydra.run.dir")
    except (ConfigError, OmegaConfBaseException):
        return  # reported with the other errors
    if is_resumed:
        with as_user_error("resume"):
            check_unlocked(folder)


def make_job(composed: DictConfig, folder: Path | None = None, has_errors: bool = False) -> Job:
    """Resolve and validate a configuration.

    When a run is resumed or a checkpoint is used, the saved configuration is the base, and
    command-line overrides are applied on top of it.

    Args:
        composed: The configuration composed by Hydra, with the `hydra` node.
        folder: The folder of a job in a sweep; an interrupted run in it is resumed.
        has_errors: Whether overrides with errors were left out, so that the job cannot run.

    Raises:
        UserError: All errors in the configuration.
    """
    override_strings = OmegaConf.to_container(composed.hydra.overrides.task)
    assert isinstance(override_strings, list)
    overrides = parse_overrides(override_strings)
    trusted = [*cli_trusted(overrides), *trusted_from_environment()]
    if trusted and (cwd := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, cwd)
    plain, issues = resolve(composed)
    issues += [*_trust_issues(plain, overrides), *_iter_path_issues(plain)]
    saved, composed_plain = half_resolve(composed, plain), plain
    differences: list[Change] = []
    try:
        key, ckpt, damaged = _base_checkpoint(composed, plain, folder)
    except ConfigError as error:
        raise ConfigError([*issues, *error.issues]) from error
    if ckpt is not None:
        value = AUTO if Path(ckpt).name == START_CONFIG else ckpt
        saved, differences = apply_overrides_to_saved(
            _saved_config(key, ckpt),
            saved | {key: LITERAL_START.sub(QUOTE, value)},
            overrides,
            resumes=key == "resume",
        )
        plain = resolve_saved(saved)
    elif plain.get("mode") not in CKPT_MODES:
        issues += _init_issues(plain)
    issues += unexpected_env_reads(plain, composed_plain)
    teacher, teacher_issues = _find_teacher(plain, trusted)
    issues += teacher_issues
    is_new = ckpt is None or any(change.is_below("data.path") for change in differences)
    overridden = find_overridden(overrides, has_errors)
    report = read_data(saved, plain, trusted, issues, is_new, overridden)
    if report is not None and report.facts:
        saved = with_data_facts(saved, report.facts)
        plain = resolve_saved(saved)
    if teacher is not None:
        issues += mismatch_issues(teacher, plain)
    config = validate(plain, trusted, issues, overridden)
    if reveal(plain) != plain:  # secrets are only in the typed configuration, never in `plain`
        config = reveal_config(plain)
    warnings = report.warnings if report else []
    return Job(
        config,
        plain,
        saved,
        trusted,
        differences,
        damaged,
        warnings,
        list(map(str, override_strings)),
    )


def prepare(composed: DictConfig, folder: Path) -> Job:
    """Make the job of a run folder and save its configuration there.

    Args:
        composed: The configuration composed by Hydra, with the `hydra` node.
        folder: The run folder, which exists.

    Raises:
        UserError: All errors in the configuration.
    """
    job = make_job(composed, folder if composed.hydra.mode == RunMode.MULTIRUN else None)
    save_config(job, folder)
    if composed.resume is not None and job.config.resume == AUTO:
        log.info("there is no checkpoint in %s: training starts from the beginning", folder)
    for problem in job.damaged_checkpoints:
        log.warning("%s; resuming from %s", problem, job.config.resume)
    for warning in job.data_warnings:
        log.warning("%s", warning)
    for difference in job.differences:
        log.warning("the configuration differs from the saved run: %s", difference)
    return job


def save_config(job: Job, folder: Path) -> None:
    """Save the configuration of a run: for a restart, and then as `config.yaml`.

    As soon as the first file exists, `resume` can start the run again.

    Raises:
        StorageError: A file cannot be written.
    """
    if job.config.mode == "train":
        write_text(folder / CHECKPOINT_DIR / START_CONFIG, json.dumps(job.saved))
    write_text(folder / "config.yaml", yaml.safe_dump(job.plain, sort_keys=False))


def has_longer_schedule(job: Job) -> bool:
    """Whether a resumed run has another length, or another goal, than before."""
    lengths = ("max_epochs", "max_steps", "max_time", "min_epochs")
    keys = (*(f"trainer.{name}" for name in lengths), "goal")
    return any(change.is_below(*keys) for change in job.differences)


def _trust_issues(plain: dict[str, Any], overrides: Sequence[Override]) -> list[ConfigIssue]:
    if not plain.get("trusted_targets") or cli_trusted(overrides):
        return []
    problem = f"={plain['trusted_targets']!r} can only be set on the command line"
    return [ConfigIssue("trusted_targets", problem)]


def _iter_path_issues(plain: dict[str, Any]) -> Iterator[ConfigIssue]:
    """Report values that are no paths, and replace them so that they are reported only once."""
    for key, allowed in PATH_KEYS.items():
        group, _, name = key.rpartition(".")
        parent: Any = plain.get(group) if group else plain
        value = parent.get(name) if isinstance(parent, dict) else None
        if value is not None and (not isinstance(value, str) or value == ""):
            hint = "" if value == "" else f"; quote a name that is no plain word: \"{key}='...'\""
            yield ConfigIssue(key, f"={value!r}: allowed: {allowed}{hint}")
            parent[name] = UNKNOWN


def _init_issues(plain: dict[str, Any]) -> list[ConfigIssue]:
    """Check that the file of initial weights exists, and that it is one."""
    weights = get_by_path(plain, "init.weights")
    if not isinstance(weights, str) or weights == UNKNOWN:
        return []
    try:
        with as_user_error("init.weights"):
            find_weights_file(Path(weights))
    except ConfigError as error:
        return error.issues
    except UserError as error:
        return [ConfigIssue("", str(error))]
    return []


def _find_teacher(
    plain: dict[str, Any], trusted: Sequence[str]
) -> tuple[Teacher | None, list[ConfigIssue]]:
    """Return the teacher that a training has, and what is wrong with it."""
    path = plain.get("teacher")
    if not isinstance(path, str) or path == UNKNOWN or plain.get("mode") in CKPT_MODES:
        return None, []
    try:
        teacher = read_teacher(Path(path))
    except ConfigError as error:
        return None, error.issues
    except UserError as error:
        return None, [ConfigIssue("", str(error))]
    return teacher, config_issues(teacher, trusted)


def resolve_folder(composed: DictConfig, key: str) -> Path:
    """Return the absolute path that `hydra.run.dir` or `hydra.sweep.dir` sets.

    Raises:
        ConfigError: The key has no value or does not resolve.
    """
    folder = str(hydra_value(composed, key))
    if "${" in folder:  # Hydra would interpolate it again
        problem = f"={folder!r}: the folder of a run cannot have '${{' in its path; rename it"
        raise ConfigError([ConfigIssue(key, problem)])
    return Path(folder).absolute()


def hydra_value(composed: DictConfig, key: str) -> Any:
    """Return the value of one of Hydra's own keys.

    Raises:
        ConfigError: The key has no value or does not resolve.
    """
    try:
        return OmegaConf.select(composed, key, throw_on_missing=True)
    except MissingMandatoryValue as error:
        problem = f" has no value; set it, for example {key}=outputs/my_run"
        raise ConfigError([ConfigIssue(key, problem)]) from error
    except OmegaConfBaseException as error:
        problem = f" does not resolve: {str(error).splitlines()[0]}"
        raise ConfigError([ConfigIssue(key, problem)]) from error


def _base_checkpoint(
    composed: DictConfig, plain: dict[str, Any], folder: Path | None
) -> tuple[Literal["resume", "ckpt"], str | None, list[str]]:
    """Return which key names the file that a job is based on, its path, and damaged checkpoints."""
    mode, ckpt = plain.get("mode"), plain.get("ckpt")
    if mode != "train":
        return "ckpt", ckpt if mode in CKPT_MODES and ckpt != UNKNOWN else None, []
    with as_user_error("resume"):
        last, damaged = resolve_resume(composed, plain.get("resume"), folder)
    return "resume", None if last is None else str(last), damaged


def resolve_resume(
    composed: DictConfig, resume: str | None, folder: Path | None
) -> tuple[Path | None, list[str]]:
    """Return the training checkpoint that a run resumes from, or else its saved configuration.

    Args:
        composed: The configuration composed by Hydra, with the `hydra` node.
        resume: The value of `resume`: a run folder, a training checkpoint in one, or `auto`.
        folder: The folder of a job in a sweep.

    Returns:
        The file, or None if the run starts from today's configuration; and what is wrong with
        each newer file.

    Raises:
        ConfigError: There is no run to resume, or `auto` has no fixed folder.
    """
    if resume in (UNKNOWN, MISSING):
        return None, []
    if resume is None:
        return _latest_checkpoint(folder) if folder else (None, [])
    if resume == AUTO:
        hydra_run = OmegaConf.to_container(composed.hydra.run, resolve=False)
        assert isinstance(hydra_run, dict)
        if "${now:" in hydra_run["dir"]:
            problem = "='auto' needs a fixed run folder, for example hydra.run.dir=outputs/my_run"
            raise ConfigError([ConfigIssue("resume", problem)])
    folder = resolve_folder(composed, "hydra.run.dir")
    if Path(resume).suffix == SUFFIX or Path(resume).expanduser().is_file():
        return _checkpoint_in(folder, resume), []
    last, damaged = _latest_checkpoint(folder)
    return last or _start_config(folder, resume), damaged


def _start_config(folder: Path, resume: str) -> Path | None:
    """Return the saved configuration of a run that was interrupted before its first checkpoint.

    A run that failed by itself is not interrupted: `auto` starts it with today's configuration.

    Raises:
        ConfigError: No run was started in the folder.
    """
    file = folder / CHECKPOINT_DIR / START_CONFIG
    has_failed = resume == AUTO and read_status(folder).get("status") == "failed"
    if file.is_file() and not has_failed:
        return file
    if resume == AUTO:
        return None
    latest = "; did you mean resume=latest?" if resume in ("last", "newest") else ""
    problem = f"={resume!r} contains no run to resume: {folder} does not exist{latest}"
    if folder.exists():
        problem = (
            f"={resume!r} contains no run to resume: nothing was started there (no checkpoint, no "
            f"{file.relative_to(folder)}); start it with its own command and "
            f"resume=auto hydra.run.dir={shlex.quote(str(folder))}"
        )
    raise ConfigError([ConfigIssue("resume", problem)])


def _latest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    last, damaged = latest_valid(folder)
    if last is None and damaged:
        raise ConfigError([ConfigIssue("resume", f": {problem}") for problem in damaged])
    return last, damaged


def _checkpoint_in(folder: Path, resume: str) -> Path:
    """Check a checkpoint file that the user named, and return its absolute path."""
    file = Path(resume).expanduser().absolute()
    if file.parent != folder / CHECKPOINT_DIR:
        run = f"the run in {folder}" if file.suffix == SUFFIX else "a run"
        problem = f"={resume!r} is not a checkpoint of {run}{_weights_hint(file)}"
        raise ConfigError([ConfigIssue("resume", problem)])
    try:
        kind = verify_checksum(file).kind
    except UserError as error:
        raise ConfigError([ConfigIssue("resume", f": {error}")]) from error
    if kind != "state":
        problem = f"={resume!r} contains weights only; resume from a {LAST_CHECKPOINT}"
        raise ConfigError([ConfigIssue("resume", problem)])
    return file


def _weights_hint(file: Path) -> str:
    """Return what a file of weights that is no checkpoint can be used for; empty if it is none."""
    try:
        is_checkpoint = read_format(file) is WeightsFormat.CHECKPOINT
    except UserError:
        return ""
    use = f"a new training can start from its weights: init.weights={file}"
    return "" if is_checkpoint else f"; {use}"


def _saved_config(key: str, ckpt: str) -> SavedConfig:
    """Return the configuration that is saved in a checkpoint or in the file of a restart."""
    with as_user_error(key):
        if not Path(ckpt).exists():
            raise ConfigError([ConfigIssue(key, f"={ckpt!r} does not exist")])
        is_start = Path(ckpt).name == START_CONFIG
        saved = read_start_config(Path(ckpt)) if is_start else _checkpoint_config(Path(ckpt))
    if saved is None:
        problem = f"={ckpt!r} was saved by a Trainer from Python and has no configuration"
        raise ConfigError([ConfigIssue(key, problem)])
    check_saved(saved, ckpt)
    return saved


def _checkpoint_config(path: Path) -> SavedConfig | None:
    """Return the configuration in a checkpoint; None if it has none."""
    from app.training.checkpoint.checkpoint import load_checkpoint

    try:
        return load_checkpoint(path).config
    except UserError as error:
        raise UserError(f"{error}{_weights_hint(path)}") from error


def read_start_config(file: Path) -> SavedConfig:
    """Return the configuration that a run was started with, as it was saved.

    Raises:
        UserError: The file is missing or damaged.
    """
    text = read_small_file(file.parent, file.name, MAX_FILE_BYTES)
    saved = parse_json(text or "", f"{file} is damaged")
    if not isinstance(saved, dict):
        raise UserError(f"{file} is damaged: it does not contain a JSON object")
    return saved
