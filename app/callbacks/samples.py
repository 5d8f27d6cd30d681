"""Draw a few samples together with the predictions of the model."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from app.callbacks.image_grids import SampleBuffer
from app.callbacks.overlays import draw_rows
from app.callbacks.selection import check_selection, is_due
from app.config.schema import STAGES
from app.runtime.figures import save_figure
from app.runtime.files import atomic_write
from app.training.accumulator import StageResult
from app.training.events import Callback, StageStart, StepEnd
from app.training.history import History

log = logging.getLogger(__name__)
MAX_COLUMNS = 8


class SampleImages(Callback):
    """Draw the first inputs of a stage and their predictions, as `samples/epoch001_valid.png`.

    Class labels become titles. Targets and predictions that are images or label maps are drawn in
    rows below the inputs; label maps and boxes over the inputs, with a legend of the classes. Of
    the predicted boxes, those with a score of at least 0.5 are drawn.

    Args:
        folder: Run folder.
        config: Resolved configuration, which tells which parts of a batch are inputs and targets
            and which outputs are class logits.
        stages: Any of `train`, `valid` and `test`.
        count: Number of samples.
        every_n_epochs: Interval in training. Stages that run only once are always drawn.

    Raises:
        UserError: A stage or the interval is not allowed.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        stages: Sequence[str] = ("valid",),
        count: int = 8,
        every_n_epochs: int = 1,
    ) -> None:
        check_selection(stages, STAGES, every_n_epochs)
        self.folder, self.config = folder / "samples", config
        self.stages, self.count, self.every_n_epochs = stages, count, every_n_epochs
        self.samples = SampleBuffer(config, 0)

    def on_stage_start(self, start: StageStart) -> None:
        should_draw = start.stage in self.stages and is_due(start, self.every_n_epochs, self.config)
        self.samples = SampleBuffer(self.config, self.count if should_draw else 0)

    def on_step_end(self, step: StepEnd) -> None:
        self.samples.add(step)

    def on_stage_end(self, result: StageResult, history: History) -> None:  # noqa: ARG002
        if self.samples.is_empty:
            return
        path = self.folder / f"{result.point.label}_{result.stage}.png"
        rows, titles = self.samples.image_rows(), self.samples.titles()
        if not rows:
            log.warning(
                "no samples drawn for stage %s: none of the inputs is an image", result.stage
            )
        elif titles:
            save_figure(path, draw_titled_images(next(iter(rows.values())), titles))
        else:
            grid = draw_rows(rows, self.samples.legend())
            atomic_write(path, partial(grid.save, format="png"))


def draw_titled_images(images: Tensor, titles: Sequence[str]) -> Figure:
    """Draw images with titles, at most eight per row."""
    num_columns = min(len(images), MAX_COLUMNS)
    num_rows = math.ceil(len(images) / num_columns)
    figure = Figure(figsize=(1.5 * num_columns, 1.8 * num_rows), layout="constrained")
    figure.suptitle("predicted / true", size=9)
    grid = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    for axes in grid:
        axes.axis("off")
    for axes, image, title in zip(grid, images, titles, strict=False):
        axes.imshow(image.permute(1, 2, 0).numpy())
        is_long = len(title) > 16
        lines = title.replace(" / ", "\n/ ") if is_long else title
        axes.set_title(lines, size=7 if is_long else 9, parse_math=False)
    return figure
