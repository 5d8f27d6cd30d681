"""Sweeps of short jobs for tests, in this process or in a separate one."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hydra._internal.utils import get_args_parser
from omegaconf import OmegaConf

from app.cli import main as cli
from app.config import resolvers
from app.config.compose import open_composer
from app.config.overrides import parse_space
from app.experiment.job import make_jobs
from app.runtime.errors import ConfigError
from app.runtime.files import write_json
from app.sweep.check import check_sweep
from app.sweep.folder import SweepFolder
from app.sweep.optuna_search import OptunaJobs
from app.sweep.run import Sweep
from app.sweep.search_options import NO_PRUNER, SearchOptions
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
    """Return a function that runs a sweep in a folder, and returns its exit code."""
    patch.chdir(cwd)
    patch.syspath_prepend(SUPPORT_DIR)
    patch.setenv("BROKEN", str(cwd / "broken"))
    patch.setenv("MARK", str(cwd / "mark"))
    # A resumed sweep does not trust the targets that its own folder lists.
    patch.setenv("APP_TRUSTED_TARGETS", "sweep_task,faulty")
    resolvers.register()

    def run(*overrides: str, short: bool = True, flags: tuple[str, ...] = ("-m",)) -> int:
        patch.setattr(sys, "argv", ["app", *flags, *(SHORT_RUN if short else ()), *overrides])
        root = logging.getLogger()
        handlers, level = root.handlers[:], root.level
        with suppress(KeyError), pytest.raises(SystemExit) as exit_info:
            cli.main()
        root.handlers[:], root.level = handlers, level
        return int(exit_info.value.code or 0)

    return run


def start_sweep(
    cwd: Path,
    *overrides: str,
    steps: int = 1,
    flags: tuple[str, ...] = (),
    cold: bool = False,
    seconds: float = 120,
) -> Command:
    """Start a sweep in a separate process, and wait until it has made some training steps.

    Args:
        cwd: Working directory.
        *overrides: Overrides of the sweep.
        steps: Training steps to wait for, in all jobs together.
        flags: Command-line flags besides `-m`.
        cold: Whether to start a new Python process instead of a forked one.
        seconds: How long to wait for the steps.
    """
    mark = cwd / "mark"
    mark.unlink(missing_ok=True)
    environment = {"MARK": str(mark), "BROKEN": str(cwd / "broken"), "PYTHONPATH": SUPPORT_DIR}
    arguments = ["-m", *flags, *SHORT_RUN, *SWEEP_TASK, *overrides]
    process = start_command(cwd, arguments, cold, **environment)
    wait_for_lines(process, mark, steps, seconds)
    return process


def sweep_folder(cwd: Path) -> Path:
    """Return the folder of the only sweep."""
    (folder,) = (cwd / "outputs" / "sweeps").glob("*/*/")
    return folder


def job_folders(folder: Path) -> list[Path]:
    """Return the run folders of a sweep by number."""
    folders = [path for path in folder.iterdir() if path.name[0].isdigit()]
    return sorted(folders, key=lambda path: int(path.name.partition("_")[0]))


def read_sweep_table(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "sweep.csv")


def job_statuses(folder: Path) -> list[str]:
    """Return the statuses in the table; they must be those in the run folders."""
    table = read_sweep_table(folder)
    for _, row in table.iterrows():
        if row["status"] != "pending":
            assert status_of(folder / row["folder"])["status"] == row["status"]
    statuses: list[str] = table["status"].tolist()
    return statuses


def step_pids(cwd: Path) -> list[int]:
    """Return the PID of the process of each training step, in order."""
    return [int(line.split()[0]) for line in (cwd / "mark").read_text().splitlines()]


def sweep_errors(*overrides: str, flags: Sequence[str] = ()) -> str:
    """Return the error message for a sweep's command line; empty if there is none."""
    resolvers.register()
    with open_composer(get_args_parser().parse_args(["-m", *flags, *overrides])) as composer:
        try:
            jobs = make_jobs(composer)
            check_sweep(composer, jobs[0][0], True)
        except ConfigError as error:
            return str(error)
    return ""


def write_search(
    folder: SweepFolder, results: Sequence[tuple[dict[str, str], dict[str, Any]]]
) -> None:
    """Write the folder of a search with the values and the `status.json` of each job."""
    for values, status in results:
        job = folder.add(values)
        write_json(folder.run_folder(job) / "status.json", status)
    folder.save()


def open_search(folder: SweepFolder, arguments: Sequence[str], **options: Any) -> OptunaJobs:
    """Return the jobs of a search that minimizes the loss, as `sweep.resume` does."""
    defaults: dict[str, Any] = {
        **{"n_trials": 100, "n_jobs": "auto", "direction": None, "objectives": {}},
        **{"storage": "sqlite", "study_name": None},
        "sampler": {"_target_": "optuna.samplers.CmaEsSampler", "seed": 0},
        "pruner": {"_target_": NO_PRUNER},
    }
    all_options = defaults | options
    config = OmegaConf.create(
        {
            "sweep": {"max_retries": 3},
            "goal": {"metric": "loss", "mode": "min"},
            "hydra": {"sweeper": {"storage": all_options["storage"]}},
        }
    )
    sweep = Sweep(config, Any, Any, list(arguments), {})  # type: ignore[arg-type]
    space = parse_space(arguments, {})
    return OptunaJobs(sweep, folder, space, SearchOptions(**all_options))
