"""The folder of a sweep: its jobs, its configuration files, and the lock of who runs it."""

from __future__ import annotations

import re
import shutil
import stat
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra.core.config_loader import ConfigLoader

from app.config.compose import SafeConfigLoader
from app.config.limits import MAX_FILE_BYTES
from app.config.overrides import JobValues
from app.config.resolve import PER_COMMAND_KEYS
from app.config.schema import NonNegative
from app.config.types import READ_FIELDS, parse_content
from app.config.yaml_files import read_yaml
from app.runtime.errors import ConfigError, ConfigIssue, UserError
from app.runtime.files import write_json, write_text
from app.runtime.lock import FolderInUseError, file_lock
from app.runtime.small_files import describe_special_file, read_json, read_small_file
from app.sweep.job import SweepJob, new_job, values_hash

SWEEP_FORMAT = 2  # version of `sweep.json`
STATE_FOLDER = ".sweep"
MAX_OVERRIDE_TEXT = 30_000  # characters of all overrides of a sweep, which Hydra parses slowly
STOP_RUNNING_JOBS = "now"  # content of the file `stopped` if running jobs should stop, too
FILE_SCHEME = "file://"
FROZEN_PROVIDERS = ("main", "command-line")  # of Hydra's search path: --config-path, --config-dir


@dataclass(frozen=True)
class JobEntry:
    """A job in `sweep.json`; see `SweepJob`."""

    __pydantic_config__ = READ_FIELDS

    number: NonNegative
    values: JobValues
    folder: str
    failures: NonNegative = 0
    retry_of: NonNegative | None = None


@dataclass(frozen=True)
class SweepFile:
    """Content of `sweep.json`."""

    __pydantic_config__ = READ_FIELDS

    format: int
    words: list[str]
    study: dict[str, Any] | None
    jobs: list[JobEntry]
    config_name: str | None = None  # not in format 1
    working_folder: str | None = None


class SweepFolder:
    """The folder of a sweep, with the state in its subfolder `.sweep/`.

    Args:
        path: Path of the folder, which need not exist yet.

    Attributes:
        jobs: Jobs of the sweep in the order of their numbers.
        overrides: Command-line overrides of the sweep.
        config_name: Name of its primary configuration file.
        working_folder: Where the command was started.
        study: Objectives and search space of the Optuna study; None without a search.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.state_folder = path, path / STATE_FOLDER
        self.jobs: list[SweepJob] = []
        self._by_hash: dict[str, SweepJob] = {}
        self._next_number = 0
        self.overrides: list[str] = []
        self.config_name, self.working_folder = "config", str(Path.cwd())
        self.study: dict[str, Any] | None = None
        if self.exists:
            self._read()

    @property
    def exists(self) -> bool:
        """Whether the folder holds a sweep."""
        return (self.state_folder / "sweep.json").exists()

    def _read(self) -> None:
        file = self.state_folder / "sweep.json"
        content = read_json(self.path, f"{STATE_FOLDER}/{file.name}")
        _check_format(file, content.get("format"))
        found = parse_content(content, SweepFile, file)
        self.overrides, self.study = found.words, found.study
        self.config_name = found.config_name or self.config_name
        self.working_folder = found.working_folder or self.working_folder
        for entry in found.jobs:
            self._append(SweepJob(**vars(entry)))
        if sum(map(len, self.overrides)) > MAX_OVERRIDE_TEXT:
            raise UserError(f"{file} has overrides of more than {MAX_OVERRIDE_TEXT:,} characters")
        for job in self.jobs:
            if not re.fullmatch(r"\w[^/\\]*", job.folder):
                problem = f"{job.folder!r} is not the name of a job folder"
                raise UserError(f"{file} is damaged: {problem}")
            special = describe_special_file(self.run_folder(job))
            if special not in (None, "a folder"):
                raise UserError(f"{self.run_folder(job)} is {special}, not a run folder")

    def save(self) -> None:
        """Replace `sweep.json`."""
        content = {
            "format": SWEEP_FORMAT,
            "words": self.overrides,
            "config_name": self.config_name,
            "working_folder": self.working_folder,
            "study": self.study,
            "jobs": [job.to_json() for job in self.jobs],
        }
        write_json(self.state_folder / "sweep.json", content)

    def find_job(self, values: JobValues) -> SweepJob | None:
        """Return the job with these values of the swept keys, if there is one."""
        return self._by_hash.get(values_hash(values))

    def add(self, values: JobValues, number: int | None = None) -> SweepJob:
        """Add a job with a number, by default the next free one."""
        job = new_job(self._next_number if number is None else number, values)
        self._append(job)
        return job

    def _append(self, job: SweepJob) -> None:
        self.jobs.append(job)
        self._by_hash.setdefault(job.hash, job)
        self._next_number = max(self._next_number, job.number + 1)

    def run_folder(self, job: SweepJob) -> Path:
        """Return the run folder of a job."""
        return self.path / job.folder

    def locked(self) -> AbstractContextManager[None]:
        """Hold the lock on this sweep; it is released when the process ends.

        Raises:
            ConfigError: Another process holds it.
        """
        problem = f"={str(self.path)!r} is being run by another process"
        error = ConfigError([ConfigIssue("sweep.resume", problem)])
        return file_lock(self.state_folder / "lock", in_use=lambda: error)

    def job_locked(self, job_folder: Path) -> AbstractContextManager[None]:
        """Hold the lock on a job while it runs in a process of another launcher.

        Raises:
            FolderInUseError: Another process runs the job.
        """
        error = FolderInUseError(f"{job_folder}: another process is running this job")
        path = self.state_folder / "running" / f"{job_folder.name}.lock"
        return file_lock(path, in_use=lambda: error)

    def is_running(self, job_folder: Path) -> bool:
        """Return whether a process of another launcher runs a job."""
        try:
            with self.job_locked(job_folder):
                return False
        except FolderInUseError:
            return True

    @property
    def _stop_file(self) -> Path:
        return self.state_folder / "stopped"

    @property
    def is_stopped(self) -> bool:
        """Whether no further job of this sweep may start, in any process."""
        return self._stop_file.exists()

    @property
    def stops_running_jobs(self) -> bool:
        """Whether running jobs should save and stop, too."""
        content = read_small_file(self.path, f"{STATE_FOLDER}/{self._stop_file.name}")
        return content == STOP_RUNNING_JOBS

    def stop(self, running_jobs: bool = False) -> None:
        """Let no further job start in any process, and maybe ask running jobs to stop, too."""
        if running_jobs or not self.is_stopped:
            write_text(self._stop_file, STOP_RUNNING_JOBS if running_jobs else "")

    def clear_stop(self) -> None:
        """Allow jobs to start again."""
        self._stop_file.unlink(missing_ok=True)

    def storage_name(self, storage: str) -> str:
        """Return the storage of a study: a file of this folder for `sqlite` and `journal`."""
        database = str(self.state_folder / "optuna.db")
        if "?" in database:  # where options begin; SQLAlchemy and SQLite each unquote once
            database = f"file:{urllib.parse.quote(urllib.parse.quote(database))}?uri=true"
        names = {
            "sqlite": f"sqlite:///{database}",
            "journal": f"journal:{self.state_folder / 'optuna.log'}",
        }
        return names.get(storage, storage)

    def save_base(self, plain: dict[str, Any]) -> None:
        """Save the configuration that all jobs share."""
        text = yaml.safe_dump(_shared_part(plain), sort_keys=False)
        write_text(self.state_folder / "base.yaml", text)

    def differences(self, plain: dict[str, Any]) -> list[str]:
        """Return a line for each value that differs from the saved shared configuration."""
        return list(_iter_differences(self.read_base(), _shared_part(plain), ""))

    def read_base(self) -> dict[str, Any]:
        """Return the saved configuration that all jobs share."""
        base: dict[str, Any] = read_yaml(self.path, f"{STATE_FOLDER}/base.yaml", dict)
        return base

    def freeze(self, loader: ConfigLoader) -> None:
        """Copy the configuration files, so that editing them changes no later job."""
        shutil.rmtree(self.state_folder / "conf", ignore_errors=True)
        for provider, path in config_sources(loader):
            source = Path(path.removeprefix(FILE_SCHEME))
            files = sorted(source.rglob("*.y*ml")) if provider in FROZEN_PROVIDERS else []
            for file in filter(_is_small_file, files):  # no other file can be composed
                target = self.state_folder / "conf" / provider / file.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)

    def frozen_conf(self, provider: str) -> str | None:
        """Return the folder with the copied files of a provider; None if it has none."""
        folder = self.state_folder / "conf" / provider
        return str(folder) if provider in FROZEN_PROVIDERS and folder.is_dir() else None

    def frozen_loader(self, loader: ConfigLoader) -> ConfigLoader:
        """Return a loader that reads the copied configuration files.

        Raises:
            UserError: One of them is not a regular file.
        """
        _check_regular_files(self.state_folder / "conf")
        search_path = ConfigSearchPathImpl()
        for provider, path in config_sources(loader):
            copied = self.frozen_conf(provider)
            search_path.append(provider, path if copied is None else f"{FILE_SCHEME}{copied}")
        return SafeConfigLoader(config_search_path=search_path)


def _is_small_file(path: Path) -> bool:
    """Return whether a path is, or links to, a regular file that can be a configuration."""
    try:
        found = path.stat()
    except OSError:  # such as a link to nothing
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size <= MAX_FILE_BYTES


def _check_regular_files(folder: Path) -> None:
    waiting = [folder] if folder.is_dir() else []
    while waiting:
        for path in waiting.pop().iterdir():
            special = describe_special_file(path)
            if special == "a folder":
                waiting.append(path)
            elif special is not None:
                raise UserError(f"{path} is {special}; allowed: a regular file")


def _check_format(file: Path, version: object) -> None:
    """Check that this version of the program can read `sweep.json`.

    Raises:
        UserError: A newer version has written it.
    """
    if isinstance(version, int) and version > SWEEP_FORMAT:
        raise UserError(
            f"{file} has format {version}, but this version of the program reads formats up to "
            f"{SWEEP_FORMAT}; use a newer version"
        )


def config_sources(loader: ConfigLoader) -> Sequence[tuple[str, str]]:
    """Providers and paths of the search path; folders always with the `file://` Hydra may omit."""
    sources = [(source.provider, source.path) for source in loader.get_search_path().get_path()]
    return [(name, path if "://" in path else f"{FILE_SCHEME}{path}") for name, path in sources]


def _shared_part(plain: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in plain.items() if k == "mode" or k not in PER_COMMAND_KEYS}


def _iter_differences(before: Any, after: Any, key: str) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for name in dict.fromkeys([*before, *after]):
            child = f"{key}.{name}" if key else str(name)
            if name not in after:
                yield f"{child}: {before[name]!r} -> removed"
            elif name not in before:
                yield f"{child}: new -> {after[name]!r}"
            else:
                yield from _iter_differences(before[name], after[name], child)
    elif before != after:
        yield f"{key}: {before!r} -> {after!r}"
