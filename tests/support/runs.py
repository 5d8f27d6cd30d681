"""Run the program, and read what a run left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from hydra._internal.utils import get_args_parser

from app.config import resolvers
from app.config.compose import compositions
from app.config.schema import Job
from app.experiment.job import make_job
from app.runtime.errors import ConfigError
from tests.support.warm import WarmCommand

FEW = ("trainer.limit_train_batches=6", "trainer.limit_valid_batches=3", "data.batch_size=50")


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
