"""Folders of images with boxes in COCO's format: layouts, labels, and files that do not fit."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from app.data import coco
from app.data.boxes import has_boxes
from app.data.coco import CocoFolder, coco_folder
from app.data.identity import identify_data
from app.data.split import subset
from app.runtime.errors import UserError
from tests.support.image_files import write_boxes, write_coco_folder
from tests.support.runs import config_issues, job_for

DETECTION = ("task=detection", "model=fcos", "loss=none", "metric=detection", "goal.metric=map")
Content = dict[str, Any]


def read_one(root: Path) -> CocoFolder:
    dataset = coco_folder(str(root))
    assert isinstance(dataset, CocoFolder)
    return dataset


def test_one_folder_gives_images_with_padded_boxes(tmp_path: Path) -> None:
    content = write_coco_folder(tmp_path, 6)
    content["annotations"][0]["iscrowd"] = 1
    content["images"].append({"id": 5, "file_name": "000.png", "height": 32, "width": 32})
    write_boxes(tmp_path, content)
    dataset = read_one(tmp_path)
    assert dataset.classes == ["circle", "rectangle"]  # by id
    by_image = [[a for a in content["annotations"] if a["image_id"] == 10 + k] for k in range(6)]
    most = max(map(len, by_image))
    for index, known in enumerate(by_image):
        image, targets = dataset[index]
        assert (image.dtype, image.shape) == (torch.uint8, (3, 32, 32 + 8 * (index % 2)))
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in known)]
        count = len(boxes)
        assert targets["boxes"][:count].tolist() == boxes
        assert targets["boxes"].shape == (most, 4)
        labels = [(a["category_id"] - 3) // 4 for a in known]
        assert targets["labels"].tolist() == labels + [-1] * (most - count)
        assert targets["crowd"].sum() == (index == 0)
        assert targets["size"].tolist() == [*image.shape[1:]]
        assert targets["frame"].tolist() == [0, 0, image.shape[2], image.shape[1]]
    assert (dataset[6][1]["labels"] == -1).all()  # an image without boxes is a sample, too
    assert has_boxes(subset(dataset, torch.tensor([2])))


def test_identity_changes_with_annotations(tmp_path: Path) -> None:
    content = write_coco_folder(tmp_path, 2)
    before = identify_data(read_one(tmp_path))
    del content["annotations"][-1]
    write_boxes(tmp_path, content)
    after = identify_data(read_one(tmp_path))
    assert before.hash not in (None, after.hash)


def test_folders_of_stages_are_read(tmp_path: Path) -> None:
    for stage in ("train", "val"):
        write_coco_folder(tmp_path / stage, 2)
    # As other programs export it: the pictures next to the file
    folder = tmp_path / "val"
    (folder / "boxes.json").rename(folder / "_annotations.coco.json")
    for picture in (folder / "images").iterdir():
        picture.rename(folder / picture.name)
    stages = coco_folder(str(tmp_path))
    assert isinstance(stages, dict)
    assert {stage: part and len(part) for stage, part in stages.items()} == {
        "train": 2,
        "valid": 2,
        "test": None,
    }
    assert stages["valid"] is not None
    assert stages["valid"].paths == ["val/000.png", "val/001.png"]


def set_box(box: object) -> Callable[[Content], None]:
    return lambda content: content["annotations"][1].update(bbox=box)


def set_annotation(**fields: object) -> Callable[[Content], None]:
    return lambda content: content["annotations"][1].update(fields)


def set_image(**fields: object) -> Callable[[Content], None]:
    return lambda content: content["images"][1].update(fields)


BAD_CONTENT: list[tuple[Callable[[Content], object], str]] = [
    (set_box([20, 20, 30, 5]), "annotation 101: bbox=[20, 20, 30, 5] is outside of its image"),
    (set_box([-4, 2, 30, 5]), "annotation 101: bbox=[-4, 2, 30, 5] is outside of its image"),
    (set_box([32.5, 2, 0.1, 5]), "annotation 101: bbox=[32.5, 2, 0.1, 5] is outside of its image"),
    (set_box([2, 2, 0, 5]), "annotation 101: bbox=[2, 2, 0, 5] has no area"),
    (set_box([2, 2, 5]), "annotation 101: bbox=[2, 2, 5] is not valid; allowed: [x, y, width"),
    (set_box([2, 2, "5", 5]), "annotation 101: bbox=[2, 2, '5', 5] is not valid"),
    (set_box([2, 2, float("nan"), 5]), "annotation 101: bbox=[2, 2, nan, 5] is not valid"),
    (set_box(None), "annotation 101: bbox=None is not valid"),
    (set_annotation(category_id=4), "annotation 101: category_id=4 is the id of no category"),
    (set_annotation(image_id=99), "annotation 101: image_id=99 is the id of no image"),
    (set_annotation(image_id=[1]), "annotation 101: image_id=[1] is the id of no image"),
    (set_annotation(iscrowd=2), "annotation 101: iscrowd=2 is not valid; allowed: 0, 1"),
    (set_annotation(id=100), "annotation 100: another one has the same id"),
    (set_annotation(id="a"), "annotation number 2 of the list has no integer id"),
    (set_image(id=10), "image 10: another one has the same id"),
    (set_image(file_name="9.png"), "image 11: file_name='9.png' does not exist in "),
    (set_image(file_name="../b/000.png"), "image 11: file_name='../b/000.png' leads out of "),
    (set_image(file_name="/etc/passwd"), "image 11: file_name='/etc/passwd' leads out of "),
    (set_image(file_name="a" * 5000), "does not exist in "),
    (set_image(file_name=7), "image 11: file_name=7 is not the name of a file"),
    (set_image(height=0), "image 11: height=0, width=40 are not valid; allowed: integers above 0"),
    (lambda c: c["categories"][0].update(id=3), "category 3: another one has the same id"),
    (lambda c: c["categories"][0].update(name="circle"), "several categories have the name 'circ"),
    (lambda c: c["categories"][0].update(name="a\x1b[1m"), "is not a name that can be printed"),
    (lambda c: c.update(annotations=[]), "'annotations' is empty; expected is a list of objects"),
    (lambda c: c.pop("images"), "'images' is missing; expected is a list of objects"),
    (lambda c: c.update(categories={}), "'categories' is missing; expected is a list of objects"),
    (lambda c: c["images"].append(3), "image number 3 of the list has no integer id"),
]


@pytest.mark.parametrize(("change", "message"), BAD_CONTENT, ids=[m[:40] for _, m in BAD_CONTENT])
def test_content_that_does_not_fit_is_named(
    tmp_path: Path, change: Callable[[Content], object], message: str
) -> None:
    content = write_coco_folder(tmp_path, 2)
    change(content)
    write_boxes(tmp_path, content)
    with pytest.raises(UserError) as error:
        coco_folder(str(tmp_path))
    assert f"{tmp_path / 'boxes.json'} is not valid" in str(error.value)
    assert message in str(error.value)


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    content = write_coco_folder(tmp_path, 2)
    set_box([0, 0, 0, 0])(content)
    content["annotations"][0]["image_id"] = 99
    write_boxes(tmp_path, content)
    with pytest.raises(UserError, match=r"(?s)annotation 100: image_id=99.*annotation 101: bbox"):
        coco_folder(str(tmp_path))


def test_box_that_leaves_its_image_by_rounding_is_cut(tmp_path: Path) -> None:
    content = write_coco_folder(tmp_path, 2)
    content["annotations"][0]["bbox"] = [-0.5, 30, 5, 2.9]
    write_boxes(tmp_path, content)
    assert read_one(tmp_path)[0][1]["boxes"][0].tolist() == [0, 30, 4.5, 32]


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda file: file.write_text("[1"), "it is not JSON"),
        (lambda file: file.write_text("[]"), "'images' is missing"),
        (lambda file: file.write_text("[" * 100 + "]" * 100), "nests values more than 64 deep"),
        (lambda file: file.write_text("[" * 100_000), "more than 1,000 values"),
        (lambda file: file.write_text(json.dumps([2**70])), "an integer of more than 64 bits"),
        (lambda file: file.write_text(json.dumps([0] * 2000)), "more than 1,000 values"),
        (lambda file: file.write_text(" " * 200_001), "has 200,001 bytes; allowed: 200,000"),
        (lambda file: file.write_bytes(b"\xff\xfe"), "it is not UTF-8 text"),
        (os.mkfifo, "is a FIFO; allowed: a regular file"),
        (lambda file: file.symlink_to("/etc/passwd"), "is a link to /etc/passwd, outside the fol"),
        (lambda _: None, "must have one JSON file, with the boxes of its images; it has none"),
        (lambda file: [file.with_stem(s).touch() for s in "ab"], "it has a.json, b.json"),
    ],
)
def test_file_that_cannot_be_read_is_one_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[Path], object],
    message: str,
) -> None:
    monkeypatch.setattr(coco, "MAX_VALUES", 1000)
    monkeypatch.setattr(coco, "MAX_BYTES", 200_000)
    write_coco_folder(tmp_path, 1)
    (tmp_path / "boxes.json").unlink()
    write(tmp_path / "boxes.json")
    with pytest.raises(UserError) as error:
        coco_folder(str(tmp_path))
    assert message in str(error.value)


def test_file_next_to_folders_of_stages_is_refused(tmp_path: Path) -> None:
    write_coco_folder(tmp_path / "train", 1)
    write_boxes(tmp_path, {})
    with pytest.raises(UserError, match=r"has a JSON file of its own and train; use one or the"):
        coco_folder(str(tmp_path))


def test_facts_come_from_training_annotations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = write_coco_folder(tmp_path / "street", 10)
    data = job_for("data=coco", "data.path=street", *DETECTION).config.data
    assert (data.num_classes, data.class_names) == (2, ["circle", "rectangle"])
    content["categories"].append({"id": 9, "name": "star"})
    write_boxes(tmp_path / "street", content)
    job = job_for("data=coco", "data.path=street", *DETECTION)
    assert job.config.data.num_classes == 3
    assert job.data_warnings == ["no box of class star in the training data"]


def test_single_class_is_enough_for_detection_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = write_coco_folder(tmp_path / "street", 10)
    content["categories"] = [{"id": 3, "name": "shape"}]
    for annotation in content["annotations"]:
        annotation["category_id"] = 3
    write_boxes(tmp_path / "street", content)
    assert job_for("data=coco", "data.path=street", *DETECTION).config.data.num_classes == 1
    (issue,) = config_issues("model=mlp", "data.num_classes=1", "data.class_names=null")
    assert issue == "data.num_classes=1; allowed: 2 or more; 1 with task=detection"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_box([2, 2, 0, 5]), "annotation 101: bbox=[2, 2, 0, 5] has no area"),
        (set_image(width=41), "001.png has 40 x 32 pixels, but 41 x 32 in the annotations"),
    ],
)
def test_data_that_do_not_fit_are_an_error_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Content], None], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    content = write_coco_folder(tmp_path / "street", 4)
    change(content)
    write_boxes(tmp_path / "street", content)
    (issue,) = config_issues("data=coco", "data.path=street", *DETECTION)
    assert message in issue


def test_other_categories_in_another_stage_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_coco_folder(tmp_path / "street/train", 2)
    content = write_coco_folder(tmp_path / "street/val", 2)
    content["categories"][0]["name"] = "square"
    write_boxes(tmp_path / "street/val", content)
    (issue,) = config_issues("data=coco", "data.path=street", *DETECTION)
    assert "data.source.valid has the classes ['circle', 'square']" in issue


def test_image_that_was_replaced_by_another_size_is_an_error(tmp_path: Path) -> None:
    write_coco_folder(tmp_path, 2)
    dataset = read_one(tmp_path)
    Image.new("RGB", (8, 9)).save(tmp_path / "images/000.png")
    with pytest.raises(UserError, match=r"000.png has 8 x 9 pixels, but 32 x 32 in the annot"):
        dataset[0]


def test_loss_as_goal_is_refused() -> None:
    (issue,) = config_issues("experiment=shapes_detection", "goal.metric=loss", "goal.mode=min")
    assert issue.startswith("goal.metric='loss': a detector has no loss in valid; choose map")


def test_cache_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_coco_folder(tmp_path / "street", 4)
    (issue,) = config_issues("data=coco", "data.path=street", "data.cache=memory", *DETECTION)
    assert "data.cache: the train data (CocoFolder) are not image files with labels or" in issue
