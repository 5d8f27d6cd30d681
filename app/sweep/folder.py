"""The folder of a sweep: which jobs it has, with which configuration, and who runs it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra.core.config_loader import ConfigLoader

from app.config.compose import SafeConfigLoader
from app.config.overrides import JobValues
from app.config.resolve import PER_COMMAND_KEYS
from app.runtime.errors import ConfigError, ConfigIssue, UserError
from app.runtime.files import write_json, write_text
from app.sweep.job import SweepJob, new_job, values_hash

SWEEP_FORMAT = 1
STATE_FOLDER = ".sweep"
FILE_SCHEME = "file://"


class SweepFolder:
    """What `.sweep/` in the folder of a sweep keeps.

    Args:
        path: Of the sweep.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.state_folder = path, path / STATE_FOLDER
        self.jobs: list[SweepJob] = []
        self.overrides: list[str] = []
        self.study: dict[str, Any] | None = None  # of a search: storage, name, objectives
        if self.exists:
            self._read()

    @property
    def exists(self) -> bool:
        """Whether there is a sweep already."""
        return (self.state_folder / "sweep.json").exists()

    def _read(self) -> None:
        file = self.state_folder / "sweep.json"
        try:
            content = json.loads(file.read_text())
            self.overrides, self.study = content["words"], content["study"]
            self.jobs = [SweepJob.from_json(job) for job in content["jobs"]]
            outside = [job.folder for job in self.jobs if not re.match(r"\w[^/\\]*$", job.folder)]
            if outside:
                raise ValueError(f"{outside[0]!r} is no folder of a job")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is damaged: {error!r}") from error

    def save(self) -> None:
        """Replaces `sweep.json`."""
        content = {
            "format": SWEEP_FORMAT,
            "words": self.overrides,
            "study": self.study,
            "jobs": [job.to_json() for job in self.jobs],
        }
        write_json(self.state_folder / "sweep.json", content)

    def find_job(self, values: JobValues) -> SweepJob | None:
        """The job that has these values."""
        return next((job for job in self.jobs if job.hash == values_hash(values)), None)

    def add(self, values: JobValues, words: list[str], number: int | None = None) -> SweepJob:
        """A further job; without a number of its own it gets the next one."""
        if number is None:
            number = max((job.number for job in self.jobs), default=-1) + 1
        self.jobs.append(new_job(number, values, words))
        return self.jobs[-1]

    def run_folder(self, job: SweepJob) -> Path:
        """The run folder of a job."""
        return self.path / job.folder

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else runs this sweep meanwhile; the lock ends with its process.

        Raises:
            ConfigError: Somebody does.
        """
        self.state_folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.state_folder / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            problem = f"={str(self.path)!r} is being run by another process"
            raise ConfigError([ConfigIssue("sweep.resume", problem)]) from error
        try:
            yield
        finally:
            lock.release()

    @property
    def is_stopped(self) -> bool:
        """Whether jobs that have not begun are not to begin, in whichever process."""
        return (self.state_folder / "stopped").exists()

    def set_stopped(self, stopped: bool) -> None:
        """Says so."""
        path = self.state_folder / "stopped"
        path.touch() if stopped else path.unlink(missing_ok=True)

    def storage_name(self, storage: str) -> str:
        """Of a study: `sqlite` and `journal` are files here; else it is an address."""
        names = {
            "sqlite": f"sqlite:///{self.state_folder / 'optuna.db'}",
            "journal": f"journal:{self.state_folder / 'optuna.log'}",
        }
        return names.get(storage, storage)

    def save_base(self, plain: dict[str, Any]) -> None:
        """Keeps what all jobs share."""
        write_text(self.state_folder / "base.yaml", yaml.safe_dump(_shared(plain), sort_keys=False))

    def differences(self, plain: dict[str, Any]) -> list[str]:
        """A line for each value in which a configuration differs from the one of all jobs."""
        saved = yaml.safe_load((self.state_folder / "base.yaml").read_text())
        return list(_differences(saved, _shared(plain), ""))

    def freeze(self, loader: ConfigLoader) -> None:
        """Copies the configuration files, so that editing them changes no later job."""
        conf = self.state_folder / "conf"
        shutil.rmtree(conf, ignore_errors=True)
        for number, (_, path) in enumerate(_sources(loader)):
            if path.startswith(FILE_SCHEME):
                copied = conf / str(number)
                for file in sorted(Path(path.removeprefix(FILE_SCHEME)).rglob("*.y*ml")):
                    target = copied / file.relative_to(path.removeprefix(FILE_SCHEME))
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, target)

    def frozen_loader(self, loader: ConfigLoader) -> ConfigLoader:
        """What composes from the copies."""
        search = ConfigSearchPathImpl()
        for number, (provider, path) in enumerate(_sources(loader)):
            copied = self.state_folder / "conf" / str(number)
            local = path.startswith(FILE_SCHEME)
            search.append(provider, f"{FILE_SCHEME}{copied}" if local else path)
        return SafeConfigLoader(config_search_path=search)


def _sources(loader: ConfigLoader) -> Sequence[tuple[str, str]]:
    """Those of folders begin with `file://`, which Hydra does not ask for."""
    found = [(one.provider, one.path) for one in loader.get_search_path().get_path()]
    return [(name, path if "://" in path else f"{FILE_SCHEME}{path}") for name, path in found]


def _shared(plain: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value for key, value in plain.items() if key == "mode" or key not in PER_COMMAND_KEYS
    }


def _differences(before: Any, after: Any, key: str) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for name in dict.fromkeys([*before, *after]):
            inner = f"{key}.{name}" if key else str(name)
            if name not in after:
                yield f"{inner}: {before[name]!r} -> removed"
            elif name not in before:
                yield f"{inner}: new -> {after[name]!r}"
            else:
                yield from _differences(before[name], after[name], inner)
    elif before != after:
        yield f"{key}: {before!r} -> {after!r}"
