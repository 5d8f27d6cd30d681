"""Draw label maps and boxes over images, with the names of the classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.utils import draw_bounding_boxes

from app.callbacks.prediction_files import class_colors, to_image
from app.callbacks.selection import class_label

FONT = Path(mpl.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
OPACITY = 0.5  # of the colors over an image
GAP, LINE = 2, 14  # pixels between images, and of a line of text
MAX_LEGEND = 40  # classes


def color_labels(labels: Tensor, colors: np.ndarray) -> Tensor:
    """Return label maps (N, height, width) as colors (N, 3, height, width) in [0, 1].

    Labels that are no class are black.
    """
    table = torch.from_numpy(np.concatenate([colors, np.zeros((1, 3), np.uint8)]))
    is_class = (labels >= 0) & (labels < len(colors))
    return table[labels.long().where(is_class, len(colors))].movedim(3, 1) / 255


def overlay(images: Tensor, labels: Tensor, colors: np.ndarray) -> Tensor:
    """Blend images (N, 3, height, width) in [0, 1] with the colors of their labels.

    Pixels whose labels are no class stay as they are. Labels of another size are drawn alone.
    """
    colored = color_labels(labels, colors)
    if images.shape != colored.shape:
        return colored
    blended = (1 - OPACITY) * images + OPACITY * colored
    is_class = (labels >= 0) & (labels < len(colors))
    return blended.where(is_class[:, None], images)


def box_colors(num_classes: int) -> np.ndarray:
    """Return the color of the boxes of each class, uint8 of shape (num_classes, 3)."""
    return class_colors(None, num_classes + 1)[1:]  # without that of a background


def draw_boxes(images: Tensor, boxes: Tensor, labels: Tensor, colors: np.ndarray) -> Tensor:
    """Draw boxes over images (N, 3, height, width) in [0, 1], in the colors of their labels.

    Args:
        images: The images.
        boxes: Shape (N, M, 4), as (x1, y1, x2, y2) in pixels.
        labels: Shape (N, M); -1 where there is no box.
        colors: Color of each label.
    """
    drawn = []
    for image, shown, kinds in zip(images, boxes, labels, strict=True):
        pixels = (image * 255).round().to(torch.uint8)
        if (is_box := kinds >= 0).any():
            chosen = [tuple(colors[label]) for label in kinds[is_box].tolist()]
            pixels = draw_bounding_boxes(pixels, shown[is_box].round(), colors=chosen)
        drawn.append(pixels)
    return torch.stack(drawn) / 255


def legend_of(config: dict[str, Any], colors: np.ndarray) -> dict[str, tuple[int, ...]]:
    """Return the color of each class by its name."""
    return {
        class_label(config, label): tuple(color)
        for label, color in enumerate(colors[:MAX_LEGEND].tolist())
    }


def draw_rows(rows: Mapping[str, Tensor], legend: Mapping[str, tuple[int, ...]]) -> Image.Image:
    """Draw a row of images for each name, which stands to the left, and a legend below.

    Args:
        rows: Images of shape (N, 3, height, width) in [0, 1]; smaller ones are enlarged to the
            largest size.
        legend: Colors by name; empty for no legend.
    """
    font = ImageFont.truetype(str(FONT), 10)
    height, width = (max(row.shape[side] for row in rows.values()) for side in (2, 3))
    left = 2 * GAP + max(int(font.getlength(name)) + 1 for name in rows)
    columns = max(len(row) for row in rows.values())
    size = (left + columns * (width + GAP), len(rows) * (height + GAP) + GAP)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for line, (name, row) in enumerate(rows.items()):
        y = GAP + line * (height + GAP)
        draw.text((GAP, y + max(0, height - LINE) // 2), name, fill="black", font=font)
        for column, values in enumerate(interpolate(row, (height, width)).numpy()):
            canvas.paste(to_image(values), (left + column * (width + GAP), y))
    return with_legend(canvas, legend)


def with_legend(image: Image.Image, legend: Mapping[str, tuple[int, ...]]) -> Image.Image:
    """Return the image with colors and their names below it."""
    if not legend:
        return image
    font = ImageFont.truetype(str(FONT), 10)
    places, lines = _place_names([*legend], max(image.width, 120), font)
    size = (max(image.width, 120), image.height + lines * LINE + GAP)
    canvas = Image.new("RGB", size, "white")
    canvas.paste(image, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for (name, color), (x, line) in zip(legend.items(), places, strict=True):
        y = image.height + GAP + line * LINE
        draw.rectangle((x, y + 1, x + 9, y + 10), fill=color, outline="gray")
        draw.text((x + 13, y), name, fill="black", font=font)
    return canvas


def _place_names(
    names: Sequence[str], width: int, font: ImageFont.FreeTypeFont
) -> tuple[list[tuple[int, int]], int]:
    """Return x and the line of each name, and the number of lines."""
    places, x, line = [], GAP, 0
    for name in names:
        length = 20 + int(font.getlength(name))
        if x > GAP and x + length > width:
            x, line = GAP, line + 1
        places.append((x, line))
        x += length
    return places, line + 1
