"""Draw the first batches of a run, as the model receives them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from app.callbacks.image_grids import normalize_images
from app.callbacks.overlays import (
    FONT,
    box_colors,
    draw_boxes,
    legend_of,
    overlay,
    with_legend,
)
from app.callbacks.prediction_files import class_colors, is_boxes, to_image
from app.callbacks.selection import class_label, pick_targets
from app.runtime.files import atomic_write
from app.runtime.nested import Nested, map_tensors, pick
from app.training.accumulator import StageResult
from app.training.events import Callback, StageStart, StepEnd
from app.training.history import History

STAGES = ("train", "valid")
COLUMNS, MIN_SIDE, CAPTION = 8, 96, 14  # images per row; pixels


class BatchImages(Callback):
    """Draw `train_batch.png` and `valid_batch.png` in the first epoch, with names of the classes.

    Masks and boxes are drawn over their images.

    The inputs are those of the model, after all transforms and augmentations, with the
    normalization undone. Nothing is drawn if the inputs are not images.

    Args:
        folder: Run folder.
        config: Resolved configuration: parts of a batch, normalization, names of classes.
        count: Number of images.
    """

    def __init__(self, folder: Path, config: dict[str, Any], count: int = 32) -> None:
        self.folder, self.config, self.count = folder, config, count
        self.is_waiting = False
        self.batch: tuple[Tensor, Nested] | None = None

    def on_stage_start(self, start: StageStart) -> None:
        is_first = start.epoch == 1 and self.config["mode"] == "train" and start.stage in STAGES
        self.is_waiting = is_first and not self._path(start.stage).exists()

    def on_step_end(self, step: StepEnd) -> None:
        if not self.is_waiting:
            return
        self.is_waiting = False
        inputs = pick(step.batch, self.config["data"]["inputs"])
        if isinstance(inputs, Tensor) and inputs.ndim == 4 and inputs.shape[1] in (1, 3):
            targets = pick_targets(step.batch, self.config)
            is_shown = isinstance(targets, Tensor) and targets.ndim in (1, 3)
            labels = targets if is_shown or is_boxes(targets) else None
            parts = (inputs, labels)
            self.batch = map_tensors(lambda part: part[: self.count].detach().clone(), parts)

    def on_stage_end(self, result: StageResult, history: History) -> None:  # noqa: ARG002
        if self.batch is None:
            return
        (images, labels), self.batch = self.batch, None
        pixels = denormalize(images.float().cpu(), self.config["data"]["normalize"])
        names: list[str] = []
        legend: dict[str, tuple[int, ...]] = {}
        if isinstance(labels, dict):
            boxes = map_tensors(Tensor.cpu, labels)
            colors = box_colors(self.config["data"]["num_classes"])
            legend = legend_of(self.config, colors)
            pixels = draw_boxes(pixels, boxes["boxes"], boxes["labels"], colors)
        elif labels is not None and not labels.is_floating_point():
            if labels.ndim == 1:
                names = [class_label(self.config, label) for label in labels.tolist()]
            elif labels.shape[1:] == pixels.shape[2:] and self.config["data"]["num_classes"]:
                data = self.config["data"]
                colors = class_colors(data.get("colors"), data["num_classes"])
                legend = legend_of(self.config, colors)
                pixels = overlay(pixels, labels.cpu(), colors)
        grid = with_legend(draw_captioned_images(pixels, names), legend)
        atomic_write(self._path(result.stage), partial(grid.save, format="png"))

    def _path(self, stage: str) -> Path:
        return self.folder / f"{stage}_batch.png"


def denormalize(images: Tensor, normalize: dict[str, Any] | None) -> Tensor:
    """Return images (N, 3, height, width) in [0, 1].

    Without known statistics, the minimum becomes black and the maximum white.
    """
    if normalize is None:
        return images.expand(-1, 3, -1, -1).clamp(0, 1)
    if "auto" in (normalize["mean"], normalize["std"]):
        return normalize_images(images)
    if len(normalize["mean"]) not in (1, images.shape[1]):  # converted to grey afterwards
        return normalize_images(images)
    mean, std = (torch.tensor(normalize[key])[:, None, None] for key in ("mean", "std"))
    return (images * std + mean).clamp(0, 1).expand(-1, 3, -1, -1)


def draw_captioned_images(images: Tensor, captions: Sequence[str]) -> Image.Image:
    """Draw images (N, 3, height, width) in rows of eight, with captions below them if there are."""
    height, width = images.shape[2:]
    scale = max(1, -(-MIN_SIDE // max(height, width)))
    cell = (width * scale + 4, height * scale + 4 + CAPTION * bool(captions))
    columns = min(COLUMNS, len(images))
    grid = Image.new("RGB", (columns * cell[0], -(-len(images) // columns) * cell[1]), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.truetype(str(FONT), 10)
    for index, values in enumerate(images.numpy()):
        x, y = index % columns * cell[0] + 2, index // columns * cell[1] + 2
        size = (width * scale, height * scale)
        grid.paste(to_image(values).resize(size, Image.Resampling.NEAREST), (x, y))
        if captions:
            text = shorten_to_width(captions[index], size[0], font)
            draw.text((x, y + height * scale), text, fill="black", font=font)
    return grid


def shorten_to_width(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """Return as much of a text as fits, on one line."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"
