"""The table of a sweep, or of any runs: one row per run, read from the run folders."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import pandas as pd

from app.config.nested import get_at
from app.config.schema import MonitorConfig
from app.config.yaml_files import read_similar_yaml, read_yaml
from app.runtime.errors import UserError, as_user_error
from app.sweep.folder import SweepFolder
from app.sweep.job import SweepJob, parse_value
from app.sweep.outcome import (
    COMPLETED,
    DAMAGED,
    FAILED,
    PENDING,
    Columns,
    RunStatus,
    read_history,
    read_run_status,
)

log = logging.getLogger(__name__)
T = TypeVar("T")
Curves: TypeAlias = dict[str, Columns]  # summary table of a run, by stage
REPEAT_KEYS = ("seed", "data.fold")  # runs that differ only in these are repetitions
DEVICE_MEMORY = "peak_device_memory_bytes"
SCALARS = (str, int, float, bool, type(None))
NOT_RESULTS = {"epoch", "step", "stage", "loss_std", "total_samples", "epoch_time", "samples/s"}
ALWAYS_DIFFERENT = ("name", "hydra")  # keys that say nothing about what runs compare
MAX_KEYS = 100  # columns of the table for keys that differ
MAX_TEST_METRICS = 500  # columns of one run, as each takes time in every statistic
MAX_OVERRIDES = 200  # of a single run whose command line is read; Hydra needs 5 ms for each
MAX_CURVES = 1_000  # runs whose curves are drawn
MAX_VALUE_LENGTH = 100  # characters of a value that is read as more than text


@dataclass(frozen=True)
class Results:
    """Source of the tables, the plots and the page.

    Attributes:
        title: Title of the page; the name of the folder.
        table: One row per run, as in `sweep.csv`; values are missing where a run has none yet.
        keys: Columns of the table that were swept, or that differ between single runs.
        goals: Goals of the runs, the most frequent first; their columns are `best_<metric>` and
            `last_<metric>`.
        curves: Summary tables (epoch, loss, accuracy, ...) by stage of each run that is drawn, by
            its `folder` in the table.
    """

    title: str
    table: pd.DataFrame
    keys: list[str]
    goals: list[MonitorConfig]
    curves: dict[str, Curves]


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

    @cached_property
    def choices(self) -> dict[str, Any]:
        """The options of the configuration groups that were chosen."""
        hydra = _read_or_warn(lambda: read_similar_yaml(self.folder, ".hydra/hydra.yaml"))
        choices = get_at(hydra, ("hydra", "runtime", "choices"))
        return choices if isinstance(choices, dict) else {}

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved configuration."""
        return _read_or_warn(lambda: read_similar_yaml(self.folder, "config.yaml")) or {}


def _read_or_warn(read: Callable[[], T]) -> T | None:
    """Return what a function reads; if the file is damaged, log a line and return None."""
    try:
        with as_user_error():
            return read()
    except UserError as error:
        log.warning("%s", error)
        return None


def list_runs(folder: Path) -> list[Run]:
    """Return the jobs of a sweep, a single run, or all runs below any other folder.

    What cannot be read is left out with a warning, or listed as damaged. Links to folders are not
    followed.
    """
    runs: list[Run] = []
    waiting = [folder]
    while waiting:  # no recursion, as folders may be nested deeper than Python allows
        path = waiting.pop()
        found = _runs_at(path)
        if found is None:
            waiting += reversed(_read_or_warn(partial(_subfolders, path)) or [])
        else:
            runs += found
    return runs


def _runs_at(folder: Path) -> list[Run] | None:
    """Return the jobs of a sweep, or a single run; None for any other folder."""
    sweep = _read_or_warn(lambda: SweepFolder(folder))
    if sweep is not None and sweep.exists:
        return [_sweep_run(sweep, job) for job in sweep.jobs]
    if not os.path.lexists(folder / "status.json"):
        return None
    return [Run(folder, None, _cli_values(folder), 1, _run_status(folder))]


def _subfolders(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    for path in found:
        if path.is_symlink():
            log.warning("%s is a link, which is not followed", path)
    return [path for path in found if not path.is_symlink()]


def _sweep_run(sweep: SweepFolder, job: SweepJob) -> Run:
    folder = sweep.run_folder(job)
    outcome = _run_status(folder)
    values = {key.lstrip("+"): _cell(text) for key, text in job.values.items()}
    attempts = job.failures + (outcome.status not in (PENDING, FAILED))
    return Run(folder, job.number, values, attempts, outcome)


def _run_status(folder: Path) -> RunStatus:
    try:
        return read_run_status(folder)
    except UserError as error:
        log.warning("%s", error)
        return RunStatus(DAMAGED, error=str(error))


def _cli_values(folder: Path) -> dict[str, Any]:
    """Values that were set on the command line of a single run."""
    overrides = _read_or_warn(lambda: read_yaml(folder, ".hydra/overrides.yaml", list)) or []
    if len(overrides) > MAX_OVERRIDES:
        log.warning("%s: only the first %d overrides are read", folder, MAX_OVERRIDES)
    pairs = [str(override).partition("=") for override in overrides[:MAX_OVERRIDES]]
    return {key.lstrip("+"): _cell(text) for key, _, text in pairs if not key.startswith("~")}


def _cell(text: str) -> Any:
    """Return the value of an override; a text that is not a short number or word stays a text."""
    try:
        value = parse_value(text) if len(text) <= MAX_VALUE_LENGTH else text
    except UserError:
        return text
    return value if isinstance(value, SCALARS) else str(value)


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
    results = Results(title, table, keys, goals, {})
    if curves:
        folders = {str(row["folder"]): run.folder for run, row in zip(runs, rows, strict=True)}
        _add_curves(results, folders)
    return results


def _add_curves(results: Results, folders: Mapping[str, Path]) -> None:
    """Read the curves of all runs, and keep those of the best."""
    drawn = set(sort_by_goal(results)["folder"].head(MAX_CURVES))
    if len(folders) > MAX_CURVES:
        log.info("the curves of the best %d of %d runs are drawn", MAX_CURVES, len(folders))
    for name, folder in folders.items():
        curves = _read_curves(folder)
        if name in drawn:
            results.curves[name] = curves


def _varied_keys(runs: Sequence[Run]) -> list[str]:
    """Keys that were swept, then those that differ between single runs."""
    swept = dict.fromkeys(key for run in runs if run.number is not None for key in run.values)
    candidates = dict.fromkeys(key for run in runs for key in run.values)
    different = [key for key in candidates if key not in swept and _is_different(runs, key)]
    keys = [*swept, *different]
    if len(keys) > MAX_KEYS:
        log.warning("only the first %d of %d different keys are shown", MAX_KEYS, len(keys))
    return keys[:MAX_KEYS]


def _is_different(runs: Sequence[Run], key: str) -> bool:
    if key.partition(".")[0] in ALWAYS_DIFFERENT:
        return False
    first = repr(_key_value(runs[0], key))
    return any(repr(_key_value(run, key)) != first for run in runs)


def _key_value(run: Run, key: str) -> Any:
    """The value of a key in a run's overrides or its configuration, or the choice of a group."""
    if key in run.values:
        return run.values[key]
    value = get_at(run.config, key.split("."))
    if value is None or isinstance(value, dict):
        value = run.choices.get(key)
    return value if isinstance(value, SCALARS) else str(value)


def _goal(run: Run) -> MonitorConfig | None:
    goal = run.outcome.content.get("goal")
    return MonitorConfig(goal["metric"], goal["mode"]) if goal else None


def _row(run: Run, keys: Sequence[str], relative_to: Path) -> dict[str, Any]:
    content, goal = run.outcome.content, _goal(run)
    best, metrics = content.get("best") or {}, content.get("metrics") or {}
    measured = {} if goal is None else metrics.get(goal.stage, {})
    test = dict(islice(metrics.get("test", {}).items(), MAX_TEST_METRICS))
    # A file name of another encoding has halves of characters, which no table can hold.
    folder = os.path.relpath(run.folder, relative_to).encode(errors="backslashreplace").decode()
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
        "folder": folder,
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


def _read_curves(folder: Path) -> Curves:
    columns = _read_or_warn(lambda: read_history(folder)) or {"stage": []}
    columns = {_short_name(name): columns[name] for name in reversed(columns)}  # the first wins
    rows: dict[str, list[int]] = {}
    for row, stage in enumerate(columns.pop("stage")):
        rows.setdefault(stage, []).append(row)
    return {
        stage: {name: [columns[name][row] for row in own] for name in reversed(columns)}
        for stage, own in rows.items()
    }


def aggregate_by_config(results: Results) -> pd.DataFrame:
    """Return the mean and sample standard deviation over seeds and folds.

    Runs that differ only in their seed or fold share a row.

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
