"""Images of samples, read back from their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from app.callbacks.image_grids import normalize_images
from app.callbacks.prediction_files import class_colors
from app.callbacks.samples import SampleImages
from app.runtime.errors import UserError
from tests.support.callback_events import send_stage


def read_png(path: Path) -> Tensor:
    """Return an image (3, height, width) in [0, 1]."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255


def draw_segmentation(folder: Path, config: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Draw three samples of a perfect segmentation whose first rows are ignored.

    Returns:
        The picture, the images and the labels.
    """
    callback = SampleImages(folder, config, count=3)
    labels = torch.randint(0, 4, (4, 8, 6), generator=torch.Generator().manual_seed(0))
    logits = nn.functional.one_hot(labels, 4).permute(0, 3, 1, 2).float()
    images = torch.rand(4, 1, 8, 6)
    targets = labels.clone()
    targets[:, 0] = 255  # ignored
    send_stage(
        callback, [((images[:2], targets[:2]), logits[:2]), ((images[2:], targets[2:]), logits[2:])]
    )
    return read_png(folder / "samples/epoch001_valid.png"), normalize_images(images[:3]), labels[:3]


def test_samples_of_segmentation_show_label_maps_over_inputs(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    grid, images, labels = draw_segmentation(tmp_path, config)
    assert grid.shape[1] == 3 * (8 + 2) + 2 + 16  # rows, and a line of the legend
    left = next(
        x
        for x in range(grid.shape[2])
        if torch.allclose(grid[:, 2:10, x : x + 6], images[0], atol=1 / 255)
    )
    tiles = grid[:, 2:32, left : left + 22].unfold(1, 8, 10).unfold(2, 6, 8)
    inputs, true, predicted = tiles[:, 0], tiles[:, 1], tiles[:, 2]
    torch.testing.assert_close(inputs.movedim(1, 0), images, atol=1 / 255, rtol=0)
    assert torch.equal(predicted[:, :, 1:], true[:, :, 1:])
    assert torch.equal(true[:, :, 0], inputs[:, :, 0])
    colors = torch.from_numpy(class_colors(None, 4)) / 255
    expected = (images + colors[labels].movedim(3, 1)) / 2
    torch.testing.assert_close(predicted.movedim(1, 0), expected, atol=1 / 255, rtol=0)


def test_samples_of_segmentation_use_the_colors_of_the_data(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    colors = {"a": "#ff0000", "ignore": "#ffffff", "b": [0, 255, 0], "c": "#0000ff", "d": "#123456"}
    config = config | {"data": config["data"] | {"colors": colors, "class_names": [*"abcd"]}}
    legend = draw_segmentation(tmp_path, config)[0][:, 33:]
    drawn = {tuple(pixel) for pixel in (legend * 255).round().long().flatten(1).T.tolist()}
    assert {(255, 0, 0), (0, 255, 0), (0, 0, 255), (18, 52, 86)} <= drawn


def test_samples_of_different_sizes_are_enlarged(tmp_path: Path, config: dict[str, Any]) -> None:
    outputs = {"image": torch.rand(2, 3, 8, 8), "code": torch.rand(2, 5)}
    send_stage(
        SampleImages(tmp_path, config, ["test"]),
        [((torch.rand(2, 1, 4, 4), torch.zeros(2)), outputs)],
        "test",
    )
    grid = read_png(tmp_path / "samples/epoch001_test.png")
    assert grid.shape[1] == 2 * (8 + 2) + 2
    expected = normalize_images(outputs["image"])[1]
    torch.testing.assert_close(grid[:, 12:20, -10:-2], expected, atol=1 / 255, rtol=0)


def test_samples_without_image_inputs_log_a_warning(
    tmp_path: Path, config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    batch = (torch.zeros(2, 5), torch.zeros(2, dtype=torch.long))
    send_stage(SampleImages(tmp_path, config), [(batch, torch.zeros(2, 3))])
    assert "none of the inputs is an image" in caplog.text
    assert not (tmp_path / "samples").exists()


def test_samples_interval_of_zero_raises(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="every_n_epochs=0; allowed: 1 or more"):
        SampleImages(tmp_path, config, every_n_epochs=0)


def test_samples_of_detection_show_boxes_over_inputs(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    data = config["data"] | {"num_classes": 2, "class_names": ["circle", "rectangle"]}
    callback = SampleImages(tmp_path, config | {"data": data}, count=1)
    boxes = torch.tensor([[[2.0, 3.0, 12.0, 13.0], [14.0, 14.0, 18.0, 18.0]]])
    targets = {"boxes": boxes, "labels": torch.tensor([[1, -1]])}
    found = {"boxes": boxes, "labels": torch.tensor([[1, 1]]), "scores": torch.tensor([[0.9, 0.4]])}
    images = torch.zeros(1, 1, 20, 20)
    send_stage(callback, [((images, targets), found)])
    grid = read_png(tmp_path / "samples/epoch001_valid.png")
    color = torch.from_numpy(class_colors(None, 3)[2].copy()) / 255
    is_drawn = (grid[:, :44] == color[:, None, None]).all(0)
    rows, columns = is_drawn.nonzero(as_tuple=True)
    for top in (2, 24):  # of targets and of predictions: one box of 11 pixels each
        inside = (rows >= top) & (rows < top + 20)
        assert (rows[inside].min() - top, rows[inside].max() - top) == (3, 13)
        assert columns[inside].max() - columns[inside].min() == 10
