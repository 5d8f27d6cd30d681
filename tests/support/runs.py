"""Run the program, and read what a run wrote."""

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
from tests.support.processes import SUPPORT_DIR
from tests.support.warm import WarmCommand

FEW_BATCHES = (
    "trainer.limit_train_batches=6",
    "trainer.limit_valid_batches=3",
    "data.batch_size=50",
)


@dataclass(frozen=True)
class RunResult:
    """The exit code, output and working directory of a finished command."""

    code: int
    out: str
    err: str
    cwd: Path

    @property
    def folder(self) -> Path:
        """The run folder, which must be the only one."""
        (folder,) = self.folders
        return folder

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


def run_app(cwd: Path, *arguments: str, **environment: str) -> RunResult:
    """Run `python -m app` in a working directory, in a process that has already imported torch.

    The modules of `tests/support` can be imported in it by their names.
    """
    environment = {"PYTHONPATH": SUPPORT_DIR, **environment}
    with tempfile.TemporaryDirectory() as temp:
        process = WarmCommand(cwd, arguments, environment, err=Path(temp, "err"))
        try:
            out, _ = process.communicate(280)
        finally:
            process.kill()
        assert process.returncode is not None
        return RunResult(process.returncode, out, Path(temp, "err").read_text(), cwd)


def run_cold(cwd: Path, *arguments: str, **environment: str) -> RunResult:
    """Run `python -m app` in a new Python process, as from a shell."""
    command = [sys.executable, "-m", "app", *arguments]
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=280, env=os.environ | environment
    )
    return RunResult(done.returncode, done.stdout, done.stderr, cwd)


def job_for(*arguments: str) -> Job:
    """Return the job of a command line without running it."""
    resolvers.register()
    ((composed, issues),) = compositions(get_args_parser().parse_args(list(arguments)))
    if issues:
        raise ConfigError(issues)
    return make_job(composed)


def config_issues(*arguments: str) -> list[str]:
    """Return the text of each error in the configuration of a command line."""
    resolvers.register()
    found: list[str] = []
    for composed, issues in compositions(get_args_parser().parse_args(list(arguments))):
        found += map(str, issues)
        try:
            make_job(composed, has_errors=bool(issues))
        except ConfigError as error:
            found += map(str, error.issues)
    return found
