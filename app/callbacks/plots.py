"""Plot the loss and each metric over the epochs, and metrics that are vectors or matrices."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from app.callbacks.selection import classes_of_metric
from app.runtime.figures import save_figure
from app.training.accumulator import StageResult
from app.training.events import Callback, EpochEnd
from app.training.history import History

NOT_PLOTTED = {"epoch", "step", "stage", "loss_std", "total_samples", "total_correct"}
MAX_TICKS = 50  # classes whose names fit beside each other
MAX_NAME = 20  # characters of a name
MIN_INTERVAL = 15.0  # seconds between redraws, so that short epochs do not wait for plotting


class Plots(Callback):
    """Write plots to `plots/`; curves at most every 15 seconds, and at the end of the run.

    A confusion matrix gets a second plot, in which every row is divided by its sum.

    Args:
        folder: Run folder.
        config: Resolved configuration, for the names of classes; None if there is none.
    """

    def __init__(self, folder: Path, config: dict[str, Any] | None = None) -> None:
        self.folder, self.config = folder / "plots", config
        self.last_drawn = time.monotonic()

    def on_stage_end(self, result: StageResult, history: History) -> None:  # noqa: ARG002
        for name, value in result.arrays.items():
            draw = {1: draw_vector, 2: draw_matrix}.get(value.ndim)
            if draw is None or not value.size:
                continue
            classes = classes_of_metric(self.config, result.stage, name, value.shape[-1])
            title = f"{name}, {result.stage}, {result.point}"
            stem = f"{result.stage}_{name}"
            save_figure(self.folder / f"{stem}.png", draw(value, title, classes))
            if classes and value.ndim == 2 and value.shape[0] == value.shape[1]:
                shares = value / np.maximum(value.sum(1, keepdims=True), 1e-12)
                figure = draw_matrix(shares, f"{title}, share of the true class", classes)
                save_figure(self.folder / f"{stem}_normalized.png", figure)

    def on_epoch_end(self, end: EpochEnd) -> None:
        if time.monotonic() - self.last_drawn > MIN_INTERVAL:
            self._draw_curves(end.history)

    def on_run_end(self, history: History) -> None:
        self._draw_curves(history)

    def _draw_curves(self, history: History) -> None:
        table = pd.DataFrame(list(history))
        for name in [column for column in table.columns if column not in NOT_PLOTTED]:
            stem = str(name).removesuffix("_mean").replace("/s", "_per_second")
            save_figure(self.folder / f"{stem}.png", draw_curve(table, str(name)))
        self.last_drawn = time.monotonic()


def draw_curve(table: pd.DataFrame, name: str) -> Figure:
    """Draw one column over epochs, or over steps if they are known, with a line per stage."""
    x = "step" if "step" in table and table["step"].notna().all() else "epoch"
    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    for stage, rows in table.dropna(subset=[name]).groupby("stage", sort=False):
        marker, line = ("*", "none") if stage == "test" else (".", "-")
        size = 12 if stage == "test" else 6
        axes.plot(rows[x], rows[name], marker=marker, ls=line, ms=size, label=str(stage))
    axes.set_xlabel(x)
    axes.set_ylabel(name.removesuffix("_mean"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def draw_vector(values: np.ndarray, title: str, classes: Sequence[str] | None = None) -> Figure:
    """Draw a vector, such as values per class, as bars; as a line above 50 values."""
    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    positions = np.arange(len(values))
    axes.bar(positions, values) if len(values) <= MAX_TICKS else axes.plot(positions, values)
    axes.set_title(title)
    if classes:
        _set_class_ticks(axes, "x", classes)
        figure.subplots_adjust(bottom=_margin(classes))
    axes.grid(alpha=0.3, axis="y")
    return figure


def draw_matrix(values: np.ndarray, title: str, classes: Sequence[str] | None = None) -> Figure:
    """Draw a confusion matrix: rows are true classes, columns are predicted ones."""
    figure = Figure(figsize=(6, 5))
    axes = figure.subplots()
    mesh = axes.imshow(values, cmap="Blues")
    figure.colorbar(mesh, ax=axes)
    axes.set_title(title, size=10)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if classes and values.shape[0] == values.shape[1]:
        _set_class_ticks(axes, "x", classes)
        _set_class_ticks(axes, "y", classes)
        figure.subplots_adjust(left=_margin(classes), bottom=_margin(classes))
    if max(values.shape) <= 20:
        middle = (values.min() + values.max()) / 2
        is_count = bool((values == np.round(values)).all())
        for (row, column), value in np.ndenumerate(values):
            color = "white" if value > middle else "black"
            axes.text(
                column,
                row,
                f"{value:g}" if is_count else f"{value:.2f}",
                ha="center",
                va="center",
                color=color,
                size=7,
            )
    return figure


def _set_class_ticks(axes: Axes, side: Literal["x", "y"], classes: Sequence[str]) -> None:
    """Set one tick per class, with its name, unless there are too many."""
    if len(classes) > MAX_TICKS:
        return
    names = [_short_name(name) for name in classes]
    is_crowded = side == "x" and max(map(len, names)) * len(names) > 60
    set_ticks = axes.set_xticks if side == "x" else axes.set_yticks
    set_ticks(
        range(len(names)),
        names,
        rotation=90 if is_crowded else 0,
        fontsize=9 if len(names) <= 20 else 6,
        parse_math=False,
    )


def _short_name(name: str) -> str:
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"


def _margin(classes: Sequence[str]) -> float:
    """Return the part of a figure that the names of classes take, without measuring them."""
    return 0.12 + 0.012 * max(len(_short_name(name)) for name in classes)
