"""Real sweeps for tests, in this process or in one of their own."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hydra._internal.utils import get_args_parser

from app.cli import main as cli
from app.config import resolvers
from app.config.compose import open_composer
from app.experiment.job import make_jobs
from app.runtime.errors import ConfigError
from app.sweep.check import check_sweep
from tests.support.processes import (
    SHORT_RUN,
    SUPPORT_DIR,
    Command,
    start_command,
    status_of,
    wait_for_lines,
)

SWEEP_TASK = ("task._target_=sweep_task.SweepTask", "trusted_targets=[sweep_task]")
POOL = "hydra/launcher=pool"
RunSweep = Callable[..., int]


def sweep_runner(cwd: Path, patch: pytest.MonkeyPatch) -> RunSweep:
    """Runs sweeps of short jobs in a folder; gives their exit codes."""
    patch.chdir(cwd)
    patch.syspath_prepend(SUPPORT_DIR)
    patch.setenv("BROKEN", str(cwd / "broken"))
    patch.setenv("MARK", str(cwd / "mark"))
    patch.setenv("APP_TRUSTED_TARGETS", "sweep_task,faulty")  # not from the sweep's folder
    resolvers.register()

    def run(*words: str, short: bool = True, flags: tuple[str, ...] = ("-m",)) -> int:
        patch.setattr(sys, "argv", ["app", *flags, *(SHORT_RUN if short else ()), *words])
        root = logging.getLogger()
        kept = root.handlers[:], root.level
        with suppress(KeyError), pytest.raises(SystemExit) as end:
            cli.main()
        root.handlers[:], root.level = kept
        return int(end.value.code or 0)

    return run


def start_sweep(
    cwd: Path, *words: str, marks: int = 1, flags: tuple[str, ...] = (), cold: bool = False
) -> Command:
    """A sweep under way in a process of its own; so many steps have been made in it."""
    mark = cwd / "mark"
    mark.unlink(missing_ok=True)
    known = {"MARK": str(mark), "BROKEN": str(cwd / "broken"), "PYTHONPATH": SUPPORT_DIR}
    process = start_command(cwd, ["-m", *flags, *SHORT_RUN, *SWEEP_TASK, *words], cold, **known)
    wait_for_lines(process, mark, marks)
    return process


def sweep_folder(cwd: Path) -> Path:
    """Of the only sweep there."""
    (found,) = (cwd / "outputs" / "sweeps").glob("*/*/")
    return found


def job_folders(folder: Path) -> list[Path]:
    """The run folders of a sweep, by number."""
    found = [path for path in folder.iterdir() if path.name[0].isdigit()]
    return sorted(found, key=lambda path: int(path.name.partition("_")[0]))


def read_sweep_table(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "sweep.csv")


def job_statuses(folder: Path) -> list[str]:
    """As the table says, and as the jobs themselves say."""
    table = read_sweep_table(folder)
    for _, line in table.iterrows():
        if line["status"] != "pending":
            assert status_of(folder / line["folder"])["status"] == line["status"]
    states: list[str] = table["status"].tolist()
    return states


def copied(folder: Path, to: Path) -> Path:
    """For a comparison later."""
    return Path(shutil.copytree(folder, to))


def step_pids(cwd: Path) -> list[Any]:
    """The process of each step of training that was made."""
    return [int(line.split()[0]) for line in (cwd / "mark").read_text().splitlines()]


def sweep_errors(*words: str) -> str:
    """What is said of a sweep's command line; empty where nothing is."""
    resolvers.register()
    with open_composer(get_args_parser().parse_args(["-m", *words])) as composing:
        try:
            jobs = make_jobs(composing)
            check_sweep(composing, jobs[0][0], True)
        except ConfigError as error:
            return str(error)
    return ""
