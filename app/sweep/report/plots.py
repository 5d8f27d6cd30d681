"""Pictures of a sweep, for papers."""

from __future__ import annotations

import math
import re
from typing import Literal, TypeAlias, TypeGuard

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from app.config.schema import MonitorConfig
from app.sweep.report.table import Results

Scale: TypeAlias = Literal["linear", "log", "category"]

MOST_IN_LEGEND = 12
LONGEST_NAME = 60
MOST_CATEGORIES = 12  # of a key with numbers, where some runs have none


def make_plots(results: Results) -> dict[str, Figure]:
    """The curves of the first goal, and its best values against each swept key.

    Returns:
        By file name; nothing where no run has a value of the goal yet.
    """
    if not results.goals or best_values(results, results.goals[0]).isna().all():
        return {}
    goal = results.goals[0]
    drawn = {f"by_{_safe(key)}.png": plot_by_key(results, goal, key) for key in results.keys}
    return {"curves.png": plot_curves(results, goal), **drawn}


def _safe(key: str) -> str:
    return re.sub(r"[^\w.+-]", "_", key)


def plot_curves(results: Results, goal: MonitorConfig) -> Figure:
    """The goal's metric over the epochs, a line for each run, the best one on top."""
    figure, axes = _empty("epoch", goal.metric)
    best = best_values(results, goal)
    winner = best.idxmax() if goal.mode == "max" else best.idxmin()
    names = zip(results.table["folder"], run_labels(results), strict=True)
    for place, (folder, label) in enumerate(names):
        rows = _rows(results.curves.get(folder), goal)
        if rows.empty:
            continue
        name = _shown(label)
        (line,) = axes.plot(rows["epoch"], rows["value"], ".-", lw=1, alpha=0.6, label=name)
        if place == winner:
            line.set(linewidth=2.5, alpha=1, zorder=3, label=f"{name} (best)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if 0 < len(axes.lines) <= MOST_IN_LEGEND:
        axes.legend(fontsize="x-small")
    return figure


def _rows(history: pd.DataFrame | None, goal: MonitorConfig) -> pd.DataFrame:
    """The goal's values of one run: epoch, value."""
    name = "loss_mean" if goal.name == "loss" else goal.name
    if history is None or name not in history:
        return pd.DataFrame({"epoch": [], "value": []})
    of_stage = history[history["stage"] == goal.stage]
    return of_stage[["epoch", name]].set_axis(["epoch", "value"], axis=1).dropna()


def plot_by_key(results: Results, goal: MonitorConfig, key: str) -> Figure:
    """The goal's best value of each run against one swept key; hollow where not completed.

    Where the seeds were swept too: also the mean and the sample standard deviation of the
    completed runs that differ in nothing but their seed.
    """
    figure, axes = _empty(key, f"best {goal.metric}")
    runs = pd.DataFrame(
        {
            "place": _places(axes, results.table[key].tolist()),
            "best": best_values(results, goal),
            "completed": (results.table["status"] == "completed").tolist(),
            "configuration": _words(results.table, [k for k in results.keys if k != "seed"]),
        }
    ).dropna()
    completed, others = runs[runs["completed"]], runs[~runs["completed"]]
    axes.plot(completed["place"], completed["best"], "o", c="C0", alpha=0.6, label="completed")
    axes.plot(others["place"], others["best"], "o", c="C0", mfc="none", label="not completed")
    if "seed" in results.keys and key != "seed":
        _draw_means(axes, completed)
    axes.legend(fontsize="small")
    return figure


def _draw_means(axes: Axes, runs: pd.DataFrame) -> None:
    groups = runs.groupby("configuration")
    place, best = groups["place"].first(), groups["best"]
    label = "mean ± std over seeds"
    axes.errorbar(place, best.mean(), best.std(), fmt="D", ms=4, c="C1", capsize=4, label=label)


def _shown(name: str) -> str:
    """Short enough for a legend, and without matplotlib's reading of what is between dollars."""
    short = name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
    return short.replace("$", r"\$")


def _empty(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(_shown(x))
    axes.set_ylabel(_shown(y))
    axes.grid(alpha=0.3)
    return figure, axes


def _places(axes: Axes, values: list[object]) -> list[float]:
    """Where the values stand on the x axis, which gets its scale and its ticks here."""
    kind = axis_scale(values)
    if kind != "category":
        axes.set_xscale(kind)
        return [float(value) if is_number(value) else math.nan for value in values]
    words = [format_value(value) for value in values]
    categories = list(dict.fromkeys(words))
    names = list(map(_shown, categories))
    axes.set_xticks(range(len(names)), names, rotation=30 if len(names) > 6 else 0)
    axes.set_xlim(-0.5, len(categories) - 0.5)
    return [float(categories.index(word)) for word in words]


def axis_scale(values: list[object]) -> Scale:
    """How an axis shows a key: positive numbers over two decades and more on a logarithmic one.

    A key of numbers that some runs do not have, as `clip: [null, 1, 5]`, is one of categories
    where the numbers are few; where they are many, those runs have no place on the axis.
    """
    numbers = [value for value in values if is_number(value)]
    others = [value for value in values if not is_number(value)]
    few = len(set(numbers)) < MOST_CATEGORIES
    if not numbers or any(format_value(value) != "null" for value in others) or (others and few):
        return "category"
    return "log" if min(numbers) > 0 and max(numbers) >= 100 * min(numbers) else "linear"


def is_number(value: object) -> TypeGuard[float]:
    """Whether the value has a place on an axis of numbers; a truth value has none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def run_labels(results: Results) -> list[str]:
    """What each run is called: the number of its job, and its values of the swept keys."""
    return _words(results.table, ["job", *results.keys])


def _words(table: pd.DataFrame, columns: list[str]) -> list[str]:
    rows = table.reindex(columns=columns).to_dict("records")
    return [
        ", ".join(f"{name}={format_value(value)}" for name, value in row.items()) for row in rows
    ]


def format_value(value: object) -> str:
    """A value as YAML writes it, with few digits."""
    if value is None or value is pd.NA or value != value:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def best_values(results: Results, goal: MonitorConfig) -> pd.Series[float]:
    """Each run's best value of the goal, by its place in the table; NaN where it has none."""
    column = f"best_{goal.metric}"
    values = pd.to_numeric(results.table.reindex(columns=[column])[column], errors="coerce")
    return values.replace([math.inf, -math.inf], math.nan).reset_index(drop=True)
