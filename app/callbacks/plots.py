"""Curves of the loss and of each metric, and pictures of matrices."""

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

NOT_DRAWN = {"epoch", "stage", "loss_std", "total_samples", "total_correct"}
SECONDS_BETWEEN = 15.0  # drawing takes a moment; short epochs do not wait for it


class Plots(Callback):
    """Draws `plots/` now and then, and at the end.

    Args:
        folder: Of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "plots"
        self.drawn = 0.0

    def on_stage_end(self, result: StageResult, history: History) -> None:  # noqa: ARG002
        for name, value in result.arrays.items():
            title = f"{name}, {result.stage}, epoch {result.epoch}"
            draw = {1: bars, 2: matrix}.get(value.ndim)
            if draw is not None and value.size:
                save_figure(self.folder / f"{result.stage}_{name}.png", draw(value, title))

    def on_epoch_end(self, end: EpochEnd) -> None:
        if time.monotonic() - self.drawn > SECONDS_BETWEEN:
            self._draw(end.history)

    def on_run_end(self, history: History) -> None:
        self._draw(history)

    def _draw(self, history: History) -> None:
        table = pd.DataFrame(list(history))
        for name in [column for column in table.columns if column not in NOT_DRAWN]:
            stem = str(name).removesuffix("_mean").replace("/s", "_per_second")
            save_figure(self.folder / f"{stem}.png", curve(table, str(name)))
        self.drawn = time.monotonic()


def curve(table: pd.DataFrame, name: str) -> Figure:
    """One quantity over the epochs, a line for each stage."""
    figure = Figure(figsize=(6, 4), layout="constrained")
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


def bars(values: np.ndarray, title: str) -> Figure:
    """A vector, as of values per class: bars where they are few, else a line."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(values))
    axes.bar(places, values) if len(values) <= 50 else axes.plot(places, values)
    axes.set_title(title)
    axes.grid(alpha=0.3, axis="y")
    return figure


def matrix(values: np.ndarray, title: str) -> Figure:
    """A matrix as a picture, rows (true classes) downwards."""
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(values, cmap="Blues")
    figure.colorbar(picture, ax=axes)
    axes.set_title(title)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if max(values.shape) <= 20:
        middle = (values.min() + values.max()) / 2
        for (row, column), value in np.ndenumerate(values):
            color = "white" if value > middle else "black"
            axes.text(column, row, f"{value:g}", ha="center", va="center", size=7, color=color)
    return figure
