"""Plots of a sweep as Matplotlib figures."""

from __future__ import annotations

import math
import re
from typing import Literal, TypeAlias, TypeGuard

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from app.config.schema import MonitorConfig
from app.runtime.escaping import escape_control
from app.sweep.report.table import REPEAT_KEYS, Curves, Results

Scale: TypeAlias = Literal["linear", "log", "category"]

MAX_LEGEND_ENTRIES = 12
MAX_LABEL_LENGTH = 60
MAX_CATEGORIES = 12  # for a key with numbers that some runs do not have
MAX_PLOTS = 20  # of single keys
MANY_TICKS = 6  # above this number, tick labels are rotated
MIN_LOG_RATIO = 100  # largest to smallest value from which on an axis is logarithmic


def make_plots(results: Results) -> dict[str, Figure]:
    """Plot the curves of the first goal, and its best values against each swept key.

    Returns:
        Figures by file name; empty if no run has a value of the goal yet.
    """
    if not results.goals or best_values(results, results.goals[0]).isna().all():
        return {}
    goal = results.goals[0]
    by_key = {
        f"by_{_safe_name(key)}.png": plot_by_key(results, goal, key)
        for key in results.keys[:MAX_PLOTS]
    }
    return {"curves.png": plot_curves(results, goal), **by_key}


def plot_curves(results: Results, goal: MonitorConfig) -> Figure:
    """Plot the metric of the goal over epochs, one line per run, with the best run on top."""
    tables = [columns for curves in results.curves.values() for columns in curves.values()]
    x = "step" if any("step" in columns for columns in tables) else "epoch"
    figure, axes = _make_axes(x, goal.metric)
    best = best_values(results, goal)
    best_row = best.idxmax() if goal.mode == "max" else best.idxmin()
    runs = zip(results.table["folder"], run_labels(results), strict=True)
    for row, (folder, run_label) in enumerate(runs):
        points = _goal_points(results.curves.get(folder, {}), goal, x)
        if not points:
            continue
        label = _label(run_label)
        (line,) = axes.plot(*zip(*points, strict=True), ".-", lw=1, alpha=0.6, label=label)
        if row == best_row:
            line.set(linewidth=2.5, alpha=1, zorder=3, label=f"{label} (best)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if 0 < len(axes.lines) <= MAX_LEGEND_ENTRIES:
        axes.legend(fontsize="x-small")
    return figure


def plot_by_key(results: Results, goal: MonitorConfig, key: str) -> Figure:
    """Plot the best value of each run against a swept key; unfilled if not completed.

    If seeds or folds were swept as well, also plot the mean and the sample standard deviation of
    the completed runs that only differ in them.
    """
    figure, axes = _make_axes(key, f"best {goal.metric}")
    runs = pd.DataFrame(
        {
            "position": _positions(axes, results.table[key].tolist()),
            "best": best_values(results, goal),
            "completed": (results.table["status"] == "completed").tolist(),
            "configuration": _row_labels(
                results.table, [k for k in results.keys if k not in REPEAT_KEYS]
            ),
        }
    ).dropna()
    completed, others = runs[runs["completed"]], runs[~runs["completed"]]
    axes.plot(completed["position"], completed["best"], "o", c="C0", alpha=0.6, label="completed")
    axes.plot(others["position"], others["best"], "o", c="C0", mfc="none", label="not completed")
    if {*REPEAT_KEYS} & {*results.keys} and key not in REPEAT_KEYS:
        _plot_means(axes, completed)
    axes.legend(fontsize="small")
    return figure


def axis_scale(values: list[object]) -> Scale:
    """Return the scale of the axis of a swept key.

    Positive numbers over two or more orders of magnitude get a logarithmic axis. A key of numbers
    that some runs do not have, such as `clip: [null, 1, 5]`, is categorical if it has few numbers;
    if it has many, those runs are not shown.
    """
    numbers = [value for value in values if is_number(value)]
    others = [value for value in values if not is_number(value)]
    has_few_numbers = len(set(numbers)) < MAX_CATEGORIES
    has_text = any(format_value(value) != "null" for value in others)
    if not numbers or has_text or (others and has_few_numbers):
        return "category"
    is_log = min(numbers) > 0 and max(numbers) >= MIN_LOG_RATIO * min(numbers)
    return "log" if is_log else "linear"


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is a finite number; a boolean is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def run_labels(results: Results) -> list[str]:
    """Return a label for each run: its job number and its values of the swept keys."""
    return _row_labels(results.table, ["job", *results.keys])


def format_value(value: object) -> str:
    """Format a value as in YAML, numbers with few digits."""
    if value is None or value is pd.NA or value != value:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def best_values(results: Results, goal: MonitorConfig) -> pd.Series[float]:
    """Return the best value of the goal for each row of the table; NaN if a run has none."""
    column = f"best_{goal.metric}"
    values = pd.to_numeric(results.table.reindex(columns=[column])[column], errors="coerce")
    return values.replace([math.inf, -math.inf], math.nan).reset_index(drop=True)


def _safe_name(key: str) -> str:
    return re.sub(r"[^\w.+-]", "_", key)[:MAX_LABEL_LENGTH]


def _goal_points(curves: Curves, goal: MonitorConfig, x: str) -> list[tuple[float, float]]:
    """The goal of one run over `x`, which is epoch or step, without missing values."""
    columns = curves.get(goal.stage, {})
    pairs = zip(columns.get(x, ()), columns.get(goal.name, ()), strict=False)
    return [(place, value) for place, value in pairs if not math.isnan(value)]


def _plot_means(axes: Axes, runs: pd.DataFrame) -> None:
    groups = runs.groupby("configuration")
    position, best = groups["position"].first(), groups["best"]
    label = "mean ± std over seeds and folds"
    axes.errorbar(position, best.mean(), best.std(), fmt="D", ms=4, c="C1", capsize=4, label=label)


def _make_axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(_label(x))
    axes.set_ylabel(_label(y))
    axes.grid(alpha=0.3)
    return figure, axes


def _positions(axes: Axes, values: list[object]) -> list[float]:
    """Positions of values on the x axis, whose scale and ticks are set here."""
    scale = axis_scale(values)
    if scale != "category":
        axes.set_xscale(scale)
        return [float(value) if is_number(value) else math.nan for value in values]
    texts = [format_value(value) for value in values]
    categories = list(dict.fromkeys(texts))
    labels = list(map(_label, categories))
    axes.set_xticks(range(len(labels)), labels, rotation=30 if len(labels) > MANY_TICKS else 0)
    axes.set_xlim(-0.5, len(categories) - 0.5)
    return [float(categories.index(text)) for text in texts]


def _row_labels(table: pd.DataFrame, columns: list[str]) -> list[str]:
    if not columns:  # of a table without columns, some versions of pandas give no records
        return [""] * len(table)
    rows = table.reindex(columns=columns).to_dict("records")
    return [
        ", ".join(f"{name}={format_value(value)}" for name, value in row.items()) for row in rows
    ]


def _label(name: str) -> str:
    """Shorten a name for a plot, and escape the dollars that Matplotlib reads as math."""
    name = escape_control(name)
    is_short = len(name) <= MAX_LABEL_LENGTH
    short = name if is_short else f"{name[: MAX_LABEL_LENGTH - 1]}…"
    return short.replace("$", r"\$")
