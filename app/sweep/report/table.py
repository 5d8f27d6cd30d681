"""The table of a sweep, or of any runs: a line for each, read from their folders."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from pandas.errors import EmptyDataError

from app.config.schema import MonitorConfig
from app.sweep.folder import SweepFolder
from app.sweep.job import parse_value
from app.sweep.outcome import COMPLETED, RunStatus, read_run_status
from app.training.history import goal_value

SEED = "seed"
NOT_RESULTS = {"epoch", "stage", "loss_std", "total_samples", "epoch_time", "samples/s"}
OWN = ("name", "hydra")  # keys that differ anyway


@dataclass(frozen=True)
class Run:
    """A run, and what is known of it beside its folder.

    Attributes:
        folder: Its own.
        number: In its sweep; None where it is of none.
        values: By swept key.
        attempts: How often it was begun.
    """

    folder: Path
    number: int | None
    values: dict[str, Any]
    attempts: int
    outcome: RunStatus


def list_runs(folder: Path) -> list[Run]:
    """Of a sweep its jobs, of a run itself, of any other folder all runs below it."""
    sweep = SweepFolder(folder)
    if sweep.exists:
        return [
            Run(
                sweep.run_folder(job),
                job.number,
                {key.lstrip("+"): parse_value(text) for key, text in job.values.items()},
                job.failures + (outcome.status not in ("pending", "failed")),
                outcome,
            )
            for job in sweep.jobs
            for outcome in [read_run_status(sweep.run_folder(job))]
        ]
    if (folder / "status.json").exists():
        return [Run(folder, None, _typed(folder), 1, read_run_status(folder))]
    inside = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    return [run for path in inside if not path.name.startswith(".") for run in list_runs(path)]


def _typed(folder: Path) -> dict[str, Any]:
    """What was typed for a single run."""
    path = folder / ".hydra" / "overrides.yaml"
    words = yaml.safe_load(path.read_text()) if path.exists() else []
    pairs = [str(word).partition("=") for word in words]
    return {key.lstrip("+"): _plain(text) for key, _, text in pairs if not key.startswith("~")}


def _plain(text: str) -> Any:
    value = parse_value(text)
    return str(value) if isinstance(value, (dict, list)) else value


def collect_results(
    title: str, runs: Sequence[Run], relative_to: Path, curves: bool = True
) -> Results:
    """The table of runs, and their curves.

    Args:
        title: Of the page.
        runs: In the order of the table.
        relative_to: Their folders are given so.
        curves: Are read, too; a table alone takes less time.
    """
    keys = _keys(runs)
    goals = _goals(runs)
    rows = [_row(run, keys, relative_to) for run in runs]
    table = pd.DataFrame({name: _column(rows, name) for name in _columns(rows, keys, goals)})
    folders = {str(row["folder"]): run.folder for run, row in zip(runs, rows, strict=True)}
    read = {name: _curve(folder) for name, folder in folders.items()} if curves else {}
    return Results(title, table, keys, goals, read)


def _keys(runs: Sequence[Run]) -> list[str]:
    """What was swept; of single runs, what differs."""
    swept = dict.fromkeys(key for run in runs if run.number is not None for key in run.values)
    typed = dict.fromkeys(key for run in runs for key in run.values)
    differ = [key for key in typed if key not in swept and _differs(runs, key)]
    return [*swept, *differ]


def _differs(runs: Sequence[Run], key: str) -> bool:
    return key.partition(".")[0] not in OWN and len({repr(_value(run, key)) for run in runs}) > 1


def _value(run: Run, key: str) -> Any:
    """As swept or typed, else as the run's configuration has it."""
    if key in run.values:
        return run.values[key]
    choices = _yaml(run.folder / ".hydra" / "hydra.yaml")
    chosen = choices.get("hydra", {}).get("runtime", {}).get("choices", {})
    if key in chosen:
        return chosen[key]
    config: Any = _yaml(run.folder / "config.yaml")
    for name in key.split("."):
        config = config.get(name) if isinstance(config, dict) else None
    return None if isinstance(config, dict) else config


def _yaml(path: Path) -> dict[str, Any]:
    return (yaml.safe_load(path.read_text()) or {}) if path.exists() else {}


def _goals(runs: Sequence[Run]) -> list[MonitorConfig]:
    found = [_goal(run) for run in runs if run.outcome.content.get("goal")]
    return [MonitorConfig(metric, mode) for (metric, mode), _ in Counter(found).most_common()]


def _goal(run: Run) -> tuple[str, Any]:
    goal = run.outcome.content["goal"]
    return goal["metric"], goal["mode"]


def _row(run: Run, keys: Sequence[str], relative_to: Path) -> dict[str, Any]:
    content = run.outcome.content
    rows = content.get("metrics") or {}
    test = rows.get("test", {})
    return {
        "job": run.number,
        "status": run.outcome.status,
        **{key: _value(run, key) for key in keys},
        **(_goal_columns(content, MonitorConfig(*_goal(run))) if content.get("goal") else {}),
        **{f"test/{_short(name)}": test[name] for name in test if name not in NOT_RESULTS},
        "seconds": content.get("seconds"),
        "samples/s": rows.get("train", {}).get("samples/s"),
        "peak_memory_bytes": content.get("peak_memory_bytes"),
        **_given(content, "peak_device_memory_bytes"),
        "attempts": run.attempts,
        "folder": os.path.relpath(run.folder, relative_to),
        "error": run.outcome.error,
    }


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> pd.Series[Any]:
    """Whole numbers stay so where some runs have none."""
    values = [row.get(name) for row in rows]
    whole = all(value is None or type(value) is int for value in values)
    return pd.Series(values, dtype=object if whole and None in values else None)


def _given(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {name: content[name]} if name in content else {}


def _short(name: str) -> str:
    return "loss" if name == "loss_mean" else name


def _goal_columns(content: Mapping[str, Any], goal: MonitorConfig) -> dict[str, Any]:
    best, last = content.get("best") or {}, (content.get("metrics") or {}).get(goal.stage, {})
    name = "loss_mean" if goal.name == "loss" else goal.name
    return {
        f"best_{goal.metric}": best.get("value"),
        "best_epoch": best.get("epoch"),
        f"last_{goal.metric}": goal_value(last, goal) if last.get(name) is not None else None,
    }


def _columns(
    rows: Iterable[Mapping[str, Any]], keys: Sequence[str], goals: Sequence[MonitorConfig]
) -> list[str]:
    """Always in the same order, whichever run has come furthest."""
    found = dict.fromkeys(name for row in rows for name in row)
    values = [c for goal in goals for c in (f"best_{goal.metric}", f"last_{goal.metric}")]
    values = [*values[:1], "best_epoch", *values[1:]] if values else []
    test = [name for name in found if name.startswith("test/") and name not in keys]
    last = ["seconds", "samples/s", "peak_memory_bytes", "peak_device_memory_bytes"]
    known = [name for name in last if name in found or name != last[-1]]
    return ["job", "status", *keys, *values, *test, *known, "attempts", "folder", "error"]


def _curve(folder: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(folder / "summary_table.csv")
    except (FileNotFoundError, EmptyDataError):
        return pd.DataFrame(columns=["epoch", "stage"])


def aggregate_by_config(results: Results) -> pd.DataFrame:
    """Mean and standard deviation (of a sample) over seeds, a line for each other configuration.

    Only completed runs count; `jobs` says how many there are, `completed` how many have.
    """
    table, keys = results.table, [key for key in results.keys if key != SEED]
    numbers = [c for c in table.columns if c.startswith(("best_", "last_", "test/"))]
    numbers = [c for c in [*numbers, "seconds", "samples/s"] if c not in results.keys]
    lines = []
    for values, rows in _groups(table, keys):
        done = rows[rows["status"] == COMPLETED]
        line: dict[str, Any] = dict(zip(keys, values, strict=True))
        line |= {"jobs": len(rows), "completed": len(done)}
        for name in numbers:
            column = pd.to_numeric(done[name], errors="coerce")
            line |= {f"{name}_mean": column.mean(), f"{name}_std": column.std()}
        lines.append(line)
    return pd.DataFrame(lines)


def _groups(table: pd.DataFrame, keys: list[str]) -> Iterable[tuple[tuple[Any, ...], pd.DataFrame]]:
    if not keys:
        return [((), table)]
    text = [table[key].map(repr) for key in keys]  # values may be of several types
    groups = table.groupby(text, sort=False)
    return [(tuple(rows.iloc[0][key] for key in keys), rows) for _, rows in groups]


def sort_by_goal(results: Results) -> pd.DataFrame:
    """The table, the best by the first goal first, those without a value last."""
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
    """The line of the best run; None where none has a value."""
    if not results.goals:
        return None
    column = f"best_{results.goals[0].metric}"
    for _, line in sort_by_goal(results).iterrows():
        if line[column] is not None and not math.isnan(float(line[column])):
            return line
    return None


@dataclass(frozen=True)
class Results:
    """What the table, the pictures and the page are made of.

    Attributes:
        title: Of the page, as the name of the sweep's folder.
        table: A line for each run, as in `sweep.csv`; without a value where a run has none yet.
        keys: The columns of the table that were swept, or that differ.
        goals: What the runs were to reach, the most frequent first; their columns are
            `best_<metric>` and `last_<metric>`.
        curves: By the table's column `folder`: a run's summary table (epoch, stage, loss_mean,
            accuracy, ...), a line for each finished stage.
    """

    title: str
    table: pd.DataFrame
    keys: list[str]
    goals: list[MonitorConfig]
    curves: dict[str, pd.DataFrame]
