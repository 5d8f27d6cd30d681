"""Real runs of the program, shared where several tests look at the same one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from hydra._internal.utils import get_args_parser
from processes import FAULTY, SHORT, SILENT, TESTS
from sweeps import Sweeps, in_this_process
from warm import WarmCommand

from app.config import resolvers
from app.config.compose import compositions
from app.config.schema import Job
from app.distributed.launch.local import launch_local
from app.experiment.entry import run_experiment
from app.experiment.job import make_job
from app.runtime.errors import ConfigError

FEW = ("trainer.limit_train_batches=6", "trainer.limit_valid_batches=3", "data.batch_size=50")

FIRST = ("test_sweep_pool", "test_sweep_search", "test_ranks", "test_launch", "test_sweep_runs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first: the last of several workers would else be alone."""
    items.sort(key=lambda item: item.path.stem not in FIRST)


@dataclass(frozen=True)
class Ran:
    """What a command came to."""

    code: int
    out: str
    err: str
    cwd: Path

    @property
    def folder(self) -> Path:
        """The run folder, which must be the only one."""
        (found,) = self.folders
        return found

    @property
    def folders(self) -> list[Path]:
        """All run folders, oldest first."""
        return sorted(path.parent for path in (self.cwd / "outputs").glob("*/*/status.json"))

    def csv(self, name: str) -> pd.DataFrame:
        return pd.read_csv(self.folder / name)

    @property
    def status(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / "status.json").read_text())
        return content

    @property
    def config(self) -> dict[str, Any]:
        content: dict[str, Any] = yaml.safe_load((self.folder / "config.yaml").read_text())
        return content


def run_app(cwd: Path, *words: str, **environment: str) -> Ran:
    """`python -m app` with those words, in that folder."""
    with tempfile.TemporaryDirectory() as text:
        process = WarmCommand(cwd, words, environment, err=Path(text, "err"))
        try:
            out, _ = process.communicate(280)
        finally:
            process.kill()
        assert process.returncode is not None
        return Ran(process.returncode, out, Path(text, "err").read_text(), cwd)


def run_cold(cwd: Path, *words: str, **environment: str) -> Ran:
    """The same from a shell, with all that Python has to import."""
    command = [sys.executable, "-m", "app", *words]
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=280, env=os.environ | environment
    )
    return Ran(done.returncode, done.stdout, done.stderr, cwd)


@pytest.fixture
def app(tmp_path: Path) -> Callable[..., Ran]:
    """Runs the program in a folder of the test's own."""

    def run(*words: str, **environment: str) -> Ran:
        return run_app(tmp_path, *words, **environment)

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """An MLP trained for two short epochs and tested on all of MNIST."""
    cwd = tmp_path_factory.mktemp("trained")
    ran = run_app(cwd, "model=mlp", "trainer.max_epochs=2", "tags=[a,b]", "notes=a note", *FEW)
    assert ran.code == 0, ran.err + ran.out
    return ran


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweeps:
    """Runs sweeps of short jobs in a folder of the test's own; gives their exit codes."""
    return in_this_process(tmp_path, monkeypatch)


def job_for(*words: str) -> Job:
    """The job of a command line, without running it."""
    resolvers.register()
    ((composed, mistakes),) = compositions(get_args_parser().parse_args(list(words)))
    if mistakes:
        raise ConfigError(mistakes)
    return make_job(composed)


def mistakes_in(*words: str) -> list[str]:
    """What is wrong with a command line, a text for each mistake."""
    resolvers.register()
    found: list[str] = []
    for composed, refused in compositions(get_args_parser().parse_args(list(words))):
        found += map(str, refused)
        try:
            make_job(composed)
        except ConfigError as error:
            found += map(str, error.issues)
    return found


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory of the test's own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Runs two ranks in which something goes wrong; gives the run folder."""
    monkeypatch.syspath_prepend(TESTS)

    def run(fault: str, *words: str, size: int = 2, flags: tuple[str, ...] = ()) -> Path:
        monkeypatch.setenv("FAULT", fault)
        job = job_for(*flags, *SHORT, *FAULTY, f"trainer.devices={size}", *words)
        launch_local(run_experiment, job, tmp_path, size, SILENT)
        return tmp_path

    return run
