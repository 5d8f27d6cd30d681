"""The folder of a sweep: which jobs it has, with which configuration, and who runs it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra.core.config_loader import ConfigLoader

from app.config.compose import SafeConfigLoader
from app.config.overrides import Values
from app.config.resolve import NOW
from app.runtime.errors import ConfigError, ConfigIssue, UserError
from app.runtime.files import write_json, write_text
from app.sweep.job import SweepJob, hash_of, new_job

FORMAT = 1
INSIDE = ".sweep"
LOCAL = "file://"


class SweepFolder:
    """What `.sweep/` in the folder of a sweep keeps.

    Args:
        path: Of the sweep.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.inside = path, path / INSIDE
        self.jobs: list[SweepJob] = []
        self.words: list[str] = []
        self.study: dict[str, Any] | None = None  # of a search: storage, name, objectives
        if self.exists:
            self._read()

    @property
    def exists(self) -> bool:
        """Whether there is a sweep already."""
        return (self.inside / "sweep.json").exists()

    def _read(self) -> None:
        file = self.inside / "sweep.json"
        try:
            content = json.loads(file.read_text())
            self.words, self.study = content["words"], content["study"]
            self.jobs = [SweepJob(**job) for job in content["jobs"]]
            outside = [job.folder for job in self.jobs if not re.match(r"\w[^/\\]*$", job.folder)]
            if outside:
                raise ValueError(f"{outside[0]!r} is no folder of a job")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is damaged: {error!r}") from error

    def save(self) -> None:
        """Replaces `sweep.json`."""
        content = {
            "format": FORMAT,
            "words": self.words,
            "study": self.study,
            "jobs": [asdict(job) for job in self.jobs],
        }
        write_json(self.inside / "sweep.json", content)

    def job_with(self, values: Values) -> SweepJob | None:
        """The job that has these values."""
        return next((job for job in self.jobs if job.hash == hash_of(values)), None)

    def add(self, values: Values, words: list[str], number: int | None = None) -> SweepJob:
        """A further job; without a number of its own it gets the next one."""
        if number is None:
            number = max((job.number for job in self.jobs), default=-1) + 1
        self.jobs.append(new_job(number, values, words))
        return self.jobs[-1]

    def of(self, job: SweepJob) -> Path:
        """The run folder of a job."""
        return self.path / job.folder

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else runs this sweep meanwhile; the lock ends with its process.

        Raises:
            ConfigError: Somebody does.
        """
        self.inside.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.inside / "lock")
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
        return (self.inside / "stopped").exists()

    def set_stopped(self, stopped: bool) -> None:
        """Says so."""
        path = self.inside / "stopped"
        path.touch() if stopped else path.unlink(missing_ok=True)

    def storage_name(self, storage: str) -> str:
        """Of a study: `sqlite` and `journal` are files here; else it is an address."""
        names = {
            "sqlite": f"sqlite:///{self.inside / 'optuna.db'}",
            "journal": f"journal:{self.inside / 'optuna.log'}",
        }
        return names.get(storage, storage)

    def save_base(self, plain: dict[str, Any]) -> None:
        """Keeps what all jobs share."""
        write_text(self.inside / "base.yaml", yaml.safe_dump(_shared(plain), sort_keys=False))

    def differences(self, plain: dict[str, Any]) -> list[str]:
        """A line for each value in which a configuration differs from the one of all jobs."""
        saved = yaml.safe_load((self.inside / "base.yaml").read_text())
        return list(_differences(saved, _shared(plain), ""))

    def freeze(self, loader: ConfigLoader) -> None:
        """Copies the configuration files, so that editing them changes no later job."""
        conf = self.inside / "conf"
        shutil.rmtree(conf, ignore_errors=True)
        for number, (_, path) in enumerate(_sources(loader)):
            if path.startswith(LOCAL):
                copied = conf / str(number)
                for file in sorted(Path(path.removeprefix(LOCAL)).rglob("*.y*ml")):
                    target = copied / file.relative_to(path.removeprefix(LOCAL))
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, target)

    def frozen_loader(self, loader: ConfigLoader) -> ConfigLoader:
        """What composes from the copies."""
        search = ConfigSearchPathImpl()
        for number, (provider, path) in enumerate(_sources(loader)):
            copied = self.inside / "conf" / str(number)
            local = path.startswith(LOCAL)
            search.append(provider, f"{LOCAL}{copied}" if local else path)
        return SafeConfigLoader(config_search_path=search)


def _sources(loader: ConfigLoader) -> Sequence[tuple[str, str]]:
    """Those of folders begin with `file://`, which Hydra does not ask for."""
    found = [(one.provider, one.path) for one in loader.get_search_path().get_path()]
    return [(name, path if "://" in path else f"{LOCAL}{path}") for name, path in found]


def _shared(plain: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in plain.items() if key == "mode" or key not in NOW}


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
