"""Datasets of image files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from app.data.images import image_folder
from app.data.split import check_datasets, dataset_labels
from app.runtime.errors import UserError


def test_image_folder_reads_images_and_refuses_damaged_ones(tmp_path: Path) -> None:
    for label, name in enumerate(("cat", "dog")):
        for number in range(3):
            (tmp_path / name).mkdir(exist_ok=True)
            image = Image.new("RGB", (30, 20 + number), (100 * label, 0, 0))
            image.save(tmp_path / name / f"{number}.png")
    dataset = image_folder(str(tmp_path))
    pixels, label = dataset[5]
    assert (pixels.shape, pixels.dtype, label) == ((3, 22, 30), torch.uint8, 1)
    assert dataset_labels(dataset, 1).tolist() == [0, 0, 0, 1, 1, 1]  # type: ignore[union-attr]
    with pytest.raises(UserError, match="has 2 classes: cat, dog"):
        check_datasets({"train": dataset}, 3, 1)
    (tmp_path / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"0\.png cannot be read as an image"):
        dataset[0]
    with pytest.raises(UserError, match="is not a folder"):
        image_folder(str(tmp_path / "none"))
