"""Folders of images and masks: layouts, labels, colors, and files that do not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from app.data.masks import MaskFolder, has_masks, mask_folder
from app.data.shapes import shapes
from app.data.split import subset
from app.runtime.errors import UserError
from tests.support.data_files import MASK_GROUPS
from tests.support.image_files import write_mask_folder
from tests.support.runs import config_issues, job_for

COLORS = {"background": "#000000", "circle": "#ff0000", "rectangle": [0, 0, 255]}
TYPED_COLORS = "data.colors={background:'#000000',circle:'#ff0000',rectangle:[0,0,255]}"
MASKS = ("data=masks", "data.path=street", *MASK_GROUPS)


def write_pixels(path: Path, pixels: object, mode: str | None = None) -> None:
    Image.fromarray(np.array(pixels, np.uint8), mode=mode).save(path)


def paint_masks(folder: Path, colors: list[list[int]]) -> None:
    """Replace labels by colors."""
    for path in (folder / "masks").iterdir():
        write_pixels(path, np.array(colors, np.uint8)[np.asarray(Image.open(path))])


def read_one(root: Path, **options: object) -> MaskFolder:
    dataset = mask_folder(str(root), **options)  # type: ignore[arg-type]
    assert isinstance(dataset, MaskFolder)
    return dataset


def test_one_folder_gives_images_with_labels(tmp_path: Path) -> None:
    write_mask_folder(tmp_path, 3)
    dataset = read_one(tmp_path)
    image, mask = dataset[1]
    assert (image.shape, image.dtype) == ((3, 32, 40), torch.uint8)
    assert (mask.shape, mask.dtype) == ((32, 40), torch.uint8)
    assert dataset.paths == [f"images/00{k}.png" for k in range(3)]
    counts = torch.bincount(mask.flatten(), minlength=256)
    assert torch.equal(dataset.pixel_counts[1], counts)
    assert has_masks(subset(dataset, torch.tensor([2])), 0, 1)


def test_folders_of_stages_and_palette_images_are_read(tmp_path: Path) -> None:
    for stage in ("train", "val"):
        write_mask_folder(tmp_path / stage, 2)
    path = tmp_path / "train/masks/000.png"
    labels = np.asarray(Image.open(path))
    image = Image.fromarray(labels, mode="P")
    image.putpalette([9, 9, 9, 200, 0, 0, 0, 0, 200])
    image.save(path)
    stages = mask_folder(str(tmp_path))
    assert isinstance(stages, dict)
    assert set(stages) == {"train", "valid", "test"}
    assert stages["test"] is None
    assert stages["train"] is not None
    assert np.array_equal(stages["train"][0][1].numpy(), labels)


def test_colors_become_labels_in_their_order(tmp_path: Path) -> None:
    write_mask_folder(tmp_path, 2)
    labels = read_one(tmp_path)[0][1]
    paint_masks(tmp_path, [[0, 0, 0], [255, 0, 0], [0, 0, 255]])
    assert torch.equal(read_one(tmp_path, colors=COLORS)[0][1], labels)
    named = {"rectangle": "#00f", "ignore": [0, 0, 0], "circle": "red"}
    swapped = read_one(tmp_path, colors=named, ignore_index=255)
    assert swapped.classes == ["rectangle", "circle"]
    expected = torch.tensor([255, 1, 0], dtype=torch.uint8)[labels.long()]
    assert torch.equal(swapped[0][1], expected)
    assert swapped.pixel_counts[:, 255].sum() == 0
    assert read_one(tmp_path, colors=["#000000", "red", "blue"]).classes is None


def test_masks_in_memory_are_recognized_by_their_shape() -> None:
    assert has_masks(shapes(2, 16), 0, 1)
    images, masks = shapes(2, 16).tensors
    other = torch.utils.data.TensorDataset
    assert not has_masks(other(images, masks[:, :8]), 0, 1)
    assert not has_masks(other(images, masks.float()), 0, 1)
    assert not has_masks(other(images, masks), [0], 1)


def test_facts_come_from_masks_without_ignored_pixels(tmp_cwd: Path) -> None:
    write_mask_folder(tmp_cwd / "street", 20)
    path = tmp_cwd / "street/masks/000.png"
    pixels = np.asarray(Image.open(path)).copy()
    pixels[:4] = 255
    write_pixels(path, pixels)
    data = job_for(*MASKS, "data.class_weights=auto").config.data
    assert (data.num_classes, data.class_names, data.input_shape) == (3, None, [3, 256, 256])
    background, circle, rectangle = data.class_weights
    assert background < 1 < min(circle, rectangle)


def test_facts_come_from_colors(tmp_cwd: Path) -> None:
    write_mask_folder(tmp_cwd / "street", 20)
    paint_masks(tmp_cwd / "street", [[0, 0, 0], [255, 0, 0], [255, 0, 0]])
    job = job_for(*MASKS, TYPED_COLORS)
    assert (job.config.data.num_classes, job.config.data.class_names) == (3, [*COLORS])
    assert job.data_warnings == ["no pixel of class rectangle in the training masks"]
    assert config_issues(*MASKS, TYPED_COLORS, "data.num_classes=4") == [
        "data.num_classes=4, but data.source.train has 3 classes: background, circle, rectangle"
    ]


def _remove(folder: Path) -> None:
    (folder / "masks/001.png").unlink()
    (folder / "images/002.png").unlink()


def _resize(folder: Path) -> None:
    write_pixels(folder / "masks/001.png", np.zeros((5, 6)))


def _truncate(folder: Path) -> None:
    path = folder / "masks/001.png"
    path.write_bytes(path.read_bytes()[:60])


def _empty(folder: Path) -> None:
    for path in folder.rglob("*.png"):
        path.unlink()


def _mark(folder: Path) -> None:
    pixels = np.asarray(Image.open(folder / "masks/001.png")).copy()
    pixels[0, 0] = 7
    write_pixels(folder / "masks/001.png", pixels)


def _paint(folder: Path) -> None:
    paint_masks(folder, [[0, 0, 0], [255, 0, 0], [0, 0, 9]])


def _blacken(folder: Path) -> None:
    for path in (folder / "masks").iterdir():
        write_pixels(path, 255 * (np.asarray(Image.open(path)) > 0))


def _compress(folder: Path) -> None:
    Image.open(folder / "masks/001.png").save(folder / "masks/001.jpg")
    (folder / "masks/001.png").unlink()


def _duplicate(folder: Path) -> None:
    Image.open(folder / "images/001.png").save(folder / "images/001.jpg")


@pytest.mark.parametrize(
    ("damage", "overrides", "messages"),
    [
        (_remove, (), ("images/001.png has no mask", "masks/002.png has no image")),
        (_resize, (), ("masks/001.png has 6 x 5 pixels, but its image 40 x 32",)),
        (_truncate, (), ("1 of 20 masks are not valid", "masks/001.png cannot be read as a mask")),
        (_empty, (), ("images contains no image",)),
        (_mark, ("data.num_classes=3",), ("masks/001.png has the label 7; allowed: 0 to 2",)),
        (_mark, (), ("the labels in the training masks are 0, 1, 2, 7",)),
        (_paint, (TYPED_COLORS,), ("has the color #000009 at x=", "allowed: #000000, #0000ff")),
        (_paint, (), ("has pixels of mode RGB; allowed: a byte with the class",)),
        (_blacken, (), ("training masks are 0, apart from data.ignore_index=255", "#ffffff")),
        (_compress, (), ("masks/001.jpg is a JPEG, which changes labels",)),
        (_duplicate, (), ("001.jpg and ", "001.png have the same name")),
        (_truncate, ("data.ignore_index=256",), ("data.ignore_index=256 is not valid",)),
        (_truncate, ("data.colors=[red,'#ff0000']",), ("'0' and '1' have the same color",)),
        (_truncate, ("data.colors={a:x,b:red}",), ("data.colors.a='x' is not a color",)),
    ],
)
def test_files_that_do_not_fit_are_errors_before_a_run(
    damage: object, overrides: tuple[str, ...], messages: tuple[str, ...], tmp_cwd: Path
) -> None:
    write_mask_folder(tmp_cwd / "street", 20)
    damage(tmp_cwd / "street")  # type: ignore[operator]
    (issue,) = config_issues(*MASKS, *overrides)
    for message in messages:
        assert message in issue


def test_a_missing_folder_of_masks_is_explained(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match=r"has no folder 'masks'; expected are .*images/1\.jpg"):
        mask_folder(str(tmp_path))
