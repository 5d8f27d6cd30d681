"""Plot the loss and each metric over the epochs, and metrics that are vectors or matrices."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from app.runtime.figures import save_figure
from app.training.accumulator import StageResult
from app.training.events import Callback, EpochEnd
from app.training.history import History

NOT_PLOTTED = {"epoch", "stage", "loss_std", "total_samples", "total_correct"}
MIN_INTERVAL = 15.0  # seconds between redraws, so that short epochs do not wait for plotting


class Plots(Callback):
    """Write plots to `plots/`; curves at most every 15 seconds, and at the end of the run.

    Args:
        folder: Run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "plots"
        self.last_drawn = time.monotonic()

    def on_stage_end(self, result: StageResult, history: History) -> None:  # noqa: ARG002
        for name, value in result.arrays.items():
            title = f"{name}, {result.stage}, epoch {result.epoch}"
            draw = {1: draw_vector, 2: draw_matrix}.get(value.ndim)
            if draw is not None and value.size:
                save_figure(self.folder / f"{result.stage}_{name}.png", draw(value, title))

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
    """Draw one column over the epochs, with a line per stage."""
    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    for stage, rows in table.dropna(subset=[name]).groupby("stage", sort=False):
        marker, line = ("*", "none") if stage == "test" else (".", "-")
        size = 12 if stage == "test" else 6
        axes.plot(rows["epoch"], rows[name], marker=marker, ls=line, ms=size, label=str(stage))
    axes.set_xlabel("epoch")
    axes.set_ylabel(name.removesuffix("_mean"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def draw_vector(values: np.ndarray, title: str) -> Figure:
    """Draw a vector, such as values per class, as bars; as a line above 50 values."""
    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    positions = np.arange(len(values))
    axes.bar(positions, values) if len(values) <= 50 else axes.plot(positions, values)
    axes.set_title(title)
    axes.grid(alpha=0.3, axis="y")
    return figure


def draw_matrix(values: np.ndarray, title: str) -> Figure:
    """Draw a confusion matrix: rows are true classes, columns are predicted ones."""
    figure = Figure(figsize=(6, 5))
    axes = figure.subplots()
    mesh = axes.imshow(values, cmap="Blues")
    figure.colorbar(mesh, ax=axes)
    axes.set_title(title)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if max(values.shape) <= 20:
        middle = (values.min() + values.max()) / 2
        for (row, column), value in np.ndenumerate(values):
            color = "white" if value > middle else "black"
            axes.text(column, row, f"{value:g}", ha="center", va="center", color=color, size=7)
    return figure
