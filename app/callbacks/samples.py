"""Pictures of a few samples and of what the model makes of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from app.callbacks.image_grids import SampleBuffer, grid
from app.callbacks.prediction_files import image
from app.callbacks.selection import check_when, is_due
from app.runtime.figures import save_figure
from app.runtime.files import atomic_write
from app.training.accumulator import StageResult
from app.training.events import Callback, StageStart, StepEnd
from app.training.history import History

log = logging.getLogger(__name__)
STAGES = ("train", "valid", "test")


class SampleImages(Callback):
    """Draws `samples/epoch001_valid.png`: the first inputs, and what the model makes of them.

    Labels of whole images become titles; label maps and images stand below the inputs.

    Args:
        folder: Of the run.
        config: Says which parts of a batch are inputs and targets, and which outputs are logits.
        stages: `train`, `valid`, `test`.
        count: How many samples.
        every_n_epochs: Of the stages in training; all else is always drawn.

    Raises:
        UserError: A stage is of another name.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        stages: Sequence[str] = ("valid",),
        count: int = 8,
        every_n_epochs: int = 1,
    ) -> None:
        check_when(stages, STAGES, every_n_epochs)
        self.folder, self.config = folder / "samples", config
        self.stages, self.count, self.every_n_epochs = stages, count, every_n_epochs
        self.samples = SampleBuffer(config, 0)

    def on_stage_start(self, start: StageStart) -> None:
        due = start.stage in self.stages and is_due(start, self.every_n_epochs, self.config)
        self.samples = SampleBuffer(self.config, self.count if due else 0)

    def on_step_end(self, step: StepEnd) -> None:
        self.samples.add(step)

    def on_stage_end(self, result: StageResult, history: History) -> None:  # noqa: ARG002
        if self.samples.is_empty:
            return
        path = self.folder / f"epoch{result.epoch:03d}_{result.stage}.png"
        rows, titles = self.samples.pictures(), self.samples.titles()
        if not rows:
            log.warning("no samples of %s: no part of the inputs is an image", result.stage)
        elif titles:
            save_figure(path, titled(rows["inputs"], titles))
        else:
            picture = image(grid(list(rows.values())).numpy())
            atomic_write(path, lambda file: picture.save(file, format="png"))


def titled(images: Tensor, titles: Sequence[str]) -> Figure:
    """Pictures with titles, eight in a row at most."""
    columns = min(len(images), 8)
    lines = math.ceil(len(images) / columns)
    figure = Figure(figsize=(1.5 * columns, 1.8 * lines), layout="constrained")
    figure.suptitle("predicted / true", size=9)
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for place in axes:
        place.axis("off")
    for place, picture, title in zip(axes, images, titles, strict=False):
        place.imshow(picture.permute(1, 2, 0).numpy())
        place.set_title(title, size=9)
    return figure
