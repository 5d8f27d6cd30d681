"""The table of a sweep, or of any runs: one row per run, read from the run folders."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from pandas.errors import EmptyDataError

from app.config.schema import MonitorConfig
from app.sweep.folder import SweepFolder
from app.sweep.job import SweepJob, parse_value
from app.sweep.outcome import COMPLETED, FAILED, PENDING, RunStatus, read_run_status

REPEAT_KEYS = ("seed", "data.fold")  # runs that differ only in these are repetitions
DEVICE_MEMORY = "peak_device_memory_bytes"
NOT_RESULTS = {"epoch", "stage", "loss_std", "total_samples", "epoch_time", "samples/s"}
ALWAYS_DIFFERENT = ("name", "hydra")  # keys that say nothing about what runs compare


@dataclass(frozen=True)
class Results:
    """Source of the tables, the plots and the page.

    Attributes:
        title: Title of the page; the name of the folder.
        table: One row per run, as in `sweep.csv`; values are missing where a run has none yet.
        keys: Columns of the table that were swept, or that differ between single runs.
        goals: Goals of the runs, the most frequent first; their columns are `best_<metric>` and
            `last_<metric>`.
        curves: Summary table of each run (epoch, stage, loss, accuracy, ...) by its `folder`
            in the table, one row per finished stage.
    """

    title: str
    table: pd.DataFrame
    keys: list[str]
    goals: list[MonitorConfig]
    curves: dict[str, pd.DataFrame]


@dataclass(frozen=True)
class Run:
    """A run to be listed in a table.

    Attributes:
        folder: Run folder.
        number: Number of the job in its sweep; None for a single run.
        values: Values of the swept keys, or of the command line of a single run.
        attempts: How often the run was started, not counting interruptions.
        outcome: Status of the run.
    """

    folder: Path
    number: int | None
    values: dict[str, Any]
    attempts: int
    outcome: RunStatus


def list_runs(folder: Path) -> list[Run]:
    """Return the jobs of a sweep, a single run, or all runs below any other folder."""
    sweep = SweepFolder(folder)
    if sweep.exists:
        return [_sweep_run(sweep, job) for job in sweep.jobs]
    if (folder / "status.json").exists():
        return [Run(folder, None, _cli_values(folder), 1, read_run_status(folder))]
    inside = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    return [run for path in inside if not path.name.startswith(".") for run in list_runs(path)]


def _sweep_run(sweep: SweepFolder, job: SweepJob) -> Run:
    folder = sweep.run_folder(job)
    outcome = read_run_status(folder)
    values = {key.lstrip("+"): parse_value(text) for key, text in job.values.items()}
    attempts = job.failures + (outcome.status not in (PENDING, FAILED))
    return Run(folder, job.number, values, attempts, outcome)


def _cli_values(folder: Path) -> dict[str, Any]:
    """Values that were set on the command line of a single run."""
    path = folder / ".hydra" / "overrides.yaml"
    overrides = yaml.safe_load(path.read_text()) if path.exists() else []
    pairs = [str(override).partition("=") for override in overrides]
    return {key.lstrip("+"): _scalar(text) for key, _, text in pairs if not key.startswith("~")}


def _scalar(text: str) -> Any:
    value = parse_value(text)
    return str(value) if isinstance(value, (dict, list)) else value


def collect_results(
    title: str, runs: Sequence[Run], relative_to: Path, curves: bool = True
) -> Results:
    """Read the table of runs, and their curves.

    Args:
        title: Title of the page.
        runs: Runs in the order of the table.
        relative_to: Folder to which the run folders in the table are relative.
        curves: Whether to read the curves, too; False is faster.
    """
    keys = _varied_keys(runs)
    counts = Counter(goal for run in runs if (goal := _goal(run)) is not None)
    goals = [goal for goal, _ in counts.most_common()]
    rows = [_row(run, keys, relative_to) for run in runs]
    table = pd.DataFrame({name: _column(rows, name) for name in _column_names(rows, keys, goals)})
    folders = {str(row["folder"]): run.folder for run, row in zip(runs, rows, strict=True)}
    read = {name: _read_curve(folder) for name, folder in folders.items()} if curves else {}
    return Results(title, table, keys, goals, read)


def _varied_keys(runs: Sequence[Run]) -> list[str]:
    """Keys that were swept, then those that differ between single runs."""
    swept = dict.fromkeys(key for run in runs if run.number is not None for key in run.values)
    candidates = dict.fromkeys(key for run in runs for key in run.values)
    different = [key for key in candidates if key not in swept and _is_different(runs, key)]
    return [*swept, *different]


def _is_different(runs: Sequence[Run], key: str) -> bool:
    if key.partition(".")[0] in ALWAYS_DIFFERENT:
        return False
    return len({repr(_key_value(run, key)) for run in runs}) > 1


def _key_value(run: Run, key: str) -> Any:
    """The value of a key in a run's overrides, its group choices or its configuration."""
    if key in run.values:
        return run.values[key]
    hydra = _read_yaml(run.folder / ".hydra" / "hydra.yaml")
    choices = hydra.get("hydra", {}).get("runtime", {}).get("choices", {})
    if key in choices:
        return choices[key]
    value: Any = _read_yaml(run.folder / "config.yaml")
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return None if isinstance(value, dict) else value


def _read_yaml(path: Path) -> dict[str, Any]:
    return (yaml.safe_load(path.read_text()) or {}) if path.exists() else {}


def _goal(run: Run) -> MonitorConfig | None:
    goal = run.outcome.content.get("goal")
    return MonitorConfig(goal["metric"], goal["mode"]) if goal else None


def _row(run: Run, keys: Sequence[str], relative_to: Path) -> dict[str, Any]:
    content, goal = run.outcome.content, _goal(run)
    best, metrics = content.get("best") or {}, content.get("metrics") or {}
    measured = {} if goal is None else metrics.get(goal.stage, {})
    test = metrics.get("test", {})
    return {
        "job": run.number,
        "status": run.outcome.status,
        **{key: _key_value(run, key) for key in keys},
        **({} if goal is None else _goal_columns(goal, best, measured)),
        **{f"test/{_short_name(name)}": test[name] for name in test if name not in NOT_RESULTS},
        "seconds": content.get("seconds"),
        "samples/s": metrics.get("train", {}).get("samples/s"),
        "peak_memory_bytes": content.get("peak_memory_bytes"),
        DEVICE_MEMORY: content.get(DEVICE_MEMORY),
        "attempts": run.attempts,
        "folder": os.path.relpath(run.folder, relative_to),
        "error": run.outcome.error,
    }


def _goal_columns(
    goal: MonitorConfig, best: Mapping[str, Any], last: Mapping[str, Any]
) -> dict[str, Any]:
    values = {_short_name(name): value for name, value in last.items()}
    return {
        f"best_{goal.metric}": best.get("value"),
        "best_epoch": best.get("epoch"),
        f"last_{goal.metric}": values.get(goal.name),
    }


def _short_name(name: str) -> str:
    return "loss" if name == "loss_mean" else name


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> pd.Series[Any]:
    """A column in which integers stay integers even if some runs have none."""
    values = [row.get(name) for row in rows]
    is_integer = all(value is None or type(value) is int for value in values)
    return pd.Series(values, dtype=object if is_integer and None in values else None)


def _column_names(
    rows: Sequence[Mapping[str, Any]], keys: Sequence[str], goals: Sequence[MonitorConfig]
) -> list[str]:
    """Columns of the table, in an order that does not depend on how far each run has come."""
    found = dict.fromkeys(name for row in rows for name in row)
    values = [c for goal in goals for c in (f"best_{goal.metric}", f"last_{goal.metric}")]
    values = [*values[:1], "best_epoch", *values[1:]] if values else []
    test = [name for name in found if name.startswith("test/") and name not in keys]
    costs = ["seconds", "samples/s", "peak_memory_bytes"]
    if any(row[DEVICE_MEMORY] is not None for row in rows):
        costs.append(DEVICE_MEMORY)
    return ["job", "status", *keys, *values, *test, *costs, "attempts", "folder", "error"]


def _read_curve(folder: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(folder / "summary_table.csv").rename(columns=_short_name)
    except (FileNotFoundError, EmptyDataError):
        return pd.DataFrame(columns=["epoch", "stage"])


def aggregate_by_config(results: Results) -> pd.DataFrame:
    """Return the mean and sample standard deviation over seeds and folds.

    There is one row per configuration that is the same but for these.

    Only completed runs count. The column `jobs` has the number of runs, `completed` the number of
    completed ones.
    """
    table, keys = results.table, [key for key in results.keys if key not in REPEAT_KEYS]
    measured = [c for c in table.columns if c.startswith(("best_", "last_", "test/"))]
    measured = [c for c in [*measured, "seconds", "samples/s"] if c not in results.keys]
    is_completed = table["status"] == COMPLETED
    numbers = table[measured].apply(pd.to_numeric, errors="coerce").where(is_completed)
    # Values may be of several types, so that only their texts can be compared.
    texts = table[keys].map(repr) if keys else table[[]].assign(all="")
    by = [texts[name] for name in texts]
    statistics = numbers.groupby(by, sort=False).agg(["mean", "std"])
    statistics.columns = statistics.columns.map("_".join)
    completed = is_completed.groupby(by, sort=False)
    statistics.insert(0, "jobs", completed.size())
    statistics.insert(1, "completed", completed.sum())
    configs = table[keys][~texts.duplicated()].reset_index(drop=True)
    averages: pd.DataFrame = pd.concat([configs, statistics.reset_index(drop=True)], axis=1)
    return averages


def sort_by_goal(results: Results) -> pd.DataFrame:
    """Return the table with the best run by the first goal on top, runs without a value last."""
    if not results.goals:
        return results.table
    goal = results.goals[0]
    return results.table.sort_values(
        f"best_{goal.metric}",
        ascending=goal.mode == "min",
        na_position="last",
        kind="stable",
        key=lambda column: pd.to_numeric(column, errors="coerce"),
    )


def best_run(results: Results) -> pd.Series[Any] | None:
    """Return the row of the best run; None if no run has a value."""
    if not results.goals:
        return None
    table, column = sort_by_goal(results), f"best_{results.goals[0].metric}"
    if table.empty or pd.isna(table[column].iloc[0]):
        return None
    best: pd.Series[Any] = table.loc[table.index[0]]
    return best
