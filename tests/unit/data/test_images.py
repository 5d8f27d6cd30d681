"""Folders of image files: layouts, damaged files, copies."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from app.data.image_checks import check_images, find_duplicates, image_problem
from app.data.images import ImageFolder, image_folder
from app.data.split import check_datasets, dataset_labels, sample_files, sample_paths, subset
from app.runtime.errors import UserError
from tests.support.image_files import write_image_folder


def read_stages(root: Path) -> dict[str, ImageFolder | None]:
    stages = image_folder(str(root))
    assert isinstance(stages, dict)
    return stages


def test_image_folder_reads_images_and_refuses_damaged_ones(tmp_path: Path) -> None:
    write_image_folder(tmp_path, {"cat": 3, "dog": 3})
    (tmp_path / ".hidden").mkdir()
    dataset = image_folder(str(tmp_path))
    assert isinstance(dataset, ImageFolder)
    pixels, label = dataset[5]
    assert (pixels.shape, pixels.dtype, label) == ((3, 28, 32), torch.uint8, 1)
    assert dataset_labels(dataset, 1).tolist() == [0, 0, 0, 1, 1, 1]  # type: ignore[union-attr]
    part = subset(dataset, torch.tensor([5, 0]))
    assert sample_paths(part) == ["dog/002.png", "cat/000.png"]
    assert sample_files(part) == [tmp_path / "dog/002.png", tmp_path / "cat/000.png"]
    with pytest.raises(UserError, match="has 2 classes: cat, dog"):
        check_datasets({"train": dataset}, 3, 1)
    (tmp_path / "cat" / "000.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"000\.png cannot be read as an image"):
        dataset[0]
    with pytest.raises(UserError, match="is not a folder"):
        image_folder(str(tmp_path / "none"))


@pytest.mark.parametrize("valid", ["valid", "val"])
def test_folders_of_stages_share_the_labels_of_training(tmp_path: Path, valid: str) -> None:
    write_image_folder(tmp_path / "train", {"ant": 2, "bee": 1, "cat": 1})
    write_image_folder(tmp_path / valid, {"bee": 1, "cat": 2})
    stages = read_stages(tmp_path)
    train, valid_data = stages["train"], stages["valid"]
    assert train is not None
    assert valid_data is not None
    assert train.classes == valid_data.classes == ["ant", "bee", "cat"]
    assert valid_data.targets == [1, 2, 2]
    assert valid_data.paths[0] == f"{valid}/bee/000.png"
    assert stages["test"] is None
    assert f"is read as train/, {valid}/ with 3 classes" in train.layout


def test_given_classes_decide_the_labels(tmp_path: Path) -> None:
    write_image_folder(tmp_path, {"dog": 2})
    dataset = image_folder(str(tmp_path), ["ant", "dog"])
    assert isinstance(dataset, ImageFolder)
    assert dataset.targets == [1, 1]


def test_missing_classes_are_refused_with_their_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no class folders.*/cat/1\.jpg and "):
        image_folder(str(tmp_path))
    write_image_folder(tmp_path / "zip", {"cat": 1, "dog": 1})
    with pytest.raises(
        UserError, match=r"only class folder 'zip'; expected .*; did you mean data\.path=.*zip"
    ):
        image_folder(str(tmp_path))
    write_image_folder(tmp_path / "all" / "train", {"cat": 1, "dog": 1})
    write_image_folder(tmp_path / "all" / "test", {"bird": 1})
    with pytest.raises(UserError, match=r"test/bird: 'bird' is not a class of the training data"):
        image_folder(str(tmp_path / "all"))
    shutil.rmtree(tmp_path / "all" / "test")
    (tmp_path / "all" / "train" / "cow").mkdir()
    with pytest.raises(UserError, match=r"train/cow contains no image; allowed: \.bmp, \.jpeg"):
        image_folder(str(tmp_path / "all"))
    write_image_folder(tmp_path / "all" / "val", {"cat": 1})
    write_image_folder(tmp_path / "all" / "valid", {"cat": 1})
    with pytest.raises(UserError, match=r"valid and .*val both exist; allowed: one of them"):
        image_folder(str(tmp_path / "all"))


def test_names_that_cannot_be_printed_are_escaped_or_refused(tmp_path: Path) -> None:
    write_image_folder(tmp_path, {"cat": 1, "dog": 1})
    file = tmp_path / "cat" / "000.png"
    file.rename(os.fsdecode(os.fsencode(file.parent) + b"/\xff\n.png"))
    dataset = image_folder(str(tmp_path))
    assert isinstance(dataset, ImageFolder)
    assert dataset[0][0].shape == (3, 24, 32)
    assert sample_paths(dataset) == ["cat/\\udcff\\n.png", "dog/000.png"]
    (tmp_path / "c\x1b[1m").mkdir()
    with pytest.raises(UserError, match=r"the folder 'c\\x1b\[1m' in .* needs a name"):
        image_folder(str(tmp_path))


def test_damaged_images_are_listed_together(tmp_path: Path) -> None:
    write_image_folder(tmp_path, {"cat": 4}, suffix="jpg")
    write_image_folder(tmp_path, {"dog": 2})
    files = sorted(tmp_path.rglob("*.*"))
    check_images(files)
    truncated, empty, text, cut = files[0], files[1], files[2], files[4]
    truncated.write_bytes(truncated.read_bytes()[:-200])
    empty.write_bytes(b"")
    text.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    cut.write_bytes(cut.read_bytes()[:300])
    with pytest.raises(UserError, match="4 of 6 images cannot be read") as error:
        check_images(files)
    lines = str(error.value).splitlines()[1:]
    assert [line.split(": ")[0].strip() for line in lines] == list(
        map(str, (truncated, empty, text, cut))
    )
    assert "the file is empty" in lines[1]
    assert "not an image; allowed: BMP, GIF, JPEG" in lines[2]


def test_complete_image_with_bytes_after_its_end_is_accepted(tmp_path: Path) -> None:
    write_image_folder(tmp_path, {"cat": 1}, suffix="jpg")
    (file,) = tmp_path.rglob("*.jpg")
    file.write_bytes(file.read_bytes() + b"appended by a camera")
    assert image_problem(file) is None


def test_copies_in_other_stages_are_listed(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "train", {"cat": 3})
    write_image_folder(tmp_path / "test", {"cat": 2}, seed=1)
    shutil.copy(tmp_path / "train/cat/001.png", tmp_path / "train/cat/002.png")
    files = {stage: sorted((tmp_path / stage).rglob("*.png")) for stage in ("train", "test")}
    assert find_duplicates(files) == []
    shutil.copy(tmp_path / "train/cat/000.png", tmp_path / "test/cat/000.png")
    (warning,) = find_duplicates(files)
    assert warning.startswith("1 images are also in another stage")
    assert "train/cat/000.png (train) = " in warning
    assert "test/cat/000.png (test)" in warning
