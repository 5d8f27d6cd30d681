"""Datasets of the Hugging Face library."""

from __future__ import annotations

import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from app.data.hugging_face import hugging_face
from app.data.split import dataset_size
from app.runtime.errors import UserError


def make_image(value: int, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (6, 4), value if mode == "L" else (value, 0, 255))


@pytest.fixture
def datasets_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    library = pytest.importorskip("datasets", reason="needs the extra hugging_face")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return library


@pytest.fixture
def saved_splits(tmp_path: Path, datasets_library: Any) -> str:
    """Return a folder with two splits, written by `save_to_disk`."""
    names = datasets_library.ClassLabel(names=["cat", "dog"])
    columns: dict[str, Any] = {"image": datasets_library.Image(), "label": names}
    features = datasets_library.Features(
        columns | {"mask": datasets_library.Image(), "score": datasets_library.Value("float32")}
    )
    rows = {
        "image": [make_image(value) for value in (1, 2, 3)],
        "label": [0, 1, 1],
        "mask": [make_image(value, "L") for value in (0, 1, 2)],
        "score": [0.5, 1.5, 2.5],
    }
    train = datasets_library.Dataset.from_dict(rows, features=features)
    path = str(tmp_path / "saved")
    datasets_library.DatasetDict(train=train, test=train.select([2])).save_to_disk(path)
    return path


def test_saved_images_are_uint8_with_int_labels(saved_splits: str) -> None:
    dataset = hugging_face(saved_splits, "train")
    x, y = dataset[1]
    assert (x.shape, x.dtype) == ((3, 4, 6), torch.uint8)
    assert x[:, 0, 0].tolist() == [2, 0, 255]
    assert type(y) is int
    assert y == 1
    assert (dataset_size(dataset), dataset_size(hugging_face(saved_splits, "test"))) == (3, 1)


def test_saved_labels_are_available_without_reading_samples(saved_splits: str) -> None:
    dataset = hugging_face(saved_splits, "train")
    assert dataset.classes == ["cat", "dog"]
    assert dataset.targets == [0, 1, 1]


def test_images_are_converted(saved_splits: str) -> None:
    x, _ = hugging_face(saved_splits, "train", image_mode="L")[0]
    assert x.shape == (1, 4, 6)


def test_image_targets_become_masks(saved_splits: str) -> None:
    dataset = hugging_face(saved_splits, "train", targets="mask")
    mask = dataset[2][1]
    assert (mask.shape, mask.dtype, int(mask[0, 0])) == ((4, 6), torch.int64, 2)
    assert dataset.targets is None
    with pytest.raises(UserError, match="a mask with 3 channels; allowed: 1"):
        hugging_face(saved_splits, "train", inputs="mask", targets="image")[0]


def test_numbers_become_tensors(saved_splits: str) -> None:
    x, y = hugging_face(saved_splits, "train", inputs="score", targets="score")[1]
    assert x.item() == y.item() == 1.5


def test_lists_become_tensors_and_unnamed_split_is_train(
    tmp_path: Path, datasets_library: Any
) -> None:
    path = str(tmp_path / "rows")
    datasets_library.Dataset.from_dict({"x": [[1.0, 2.0]], "y": [4]}).save_to_disk(path)
    dataset = hugging_face(path, "train", inputs="x", targets="y")
    x, y = dataset[0]
    assert (x.tolist(), y) == ([1, 2], 4)
    assert (dataset.targets, dataset.classes) == ([4], None)
    with pytest.raises(UserError, match="no split 'test'; available: train"):
        hugging_face(path, "test", inputs="x", targets="y")


def test_csv_file_is_read(tmp_path: Path, datasets_library: Any) -> None:  # noqa: ARG001
    (tmp_path / "rows.csv").write_text("a,label\n1.5,0\n2.5,1\n")
    dataset = hugging_face(str(tmp_path / "rows.csv"), "train", inputs="a")
    assert [(x.item(), y) for x, y in (dataset[0], dataset[1])] == [(1.5, 0), (2.5, 1)]


def test_folder_of_images_is_read(tmp_path: Path, datasets_library: Any) -> None:  # noqa: ARG001
    for name in ("cat", "dog"):
        (tmp_path / "pets" / "train" / name).mkdir(parents=True)
        make_image(7).save(tmp_path / "pets" / "train" / name / "1.png")
    dataset = hugging_face(str(tmp_path / "pets"), "train")
    assert dataset.classes == ["cat", "dog"]
    assert dataset[1][0][0, 0, 0] == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "tets"}, "no split 'tets'; available: test, train"),
        (
            {"inputs": "img"},
            "no column 'img'; available: image, label, mask, score; did you mean 'image'",
        ),
        ({"targets": "labels"}, "no column 'labels'; .*did you mean 'label'"),
        ({"image_mode": "RBG"}, "image_mode='RBG' is unknown; allowed: .*did you mean 'RGB'"),
    ],
)
def test_unknown_split_column_or_mode_is_named(
    saved_splits: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        hugging_face(saved_splits, **({"split": "train"} | options))


def test_text_column_is_refused(tmp_path: Path, datasets_library: Any) -> None:
    path = str(tmp_path / "rows")
    datasets_library.Dataset.from_dict({"x": [1.0], "y": ["cat"]}).save_to_disk(path)
    with pytest.raises(UserError, match=r"sample 0, column 'y' is of type str; allowed: images"):
        hugging_face(path, "train", inputs="x", targets="y")[0]


def test_missing_label_is_refused(tmp_path: Path, datasets_library: Any) -> None:
    path = str(tmp_path / "rows")
    datasets_library.Dataset.from_dict({"x": [1.0, 2.0], "y": [1, None]}).save_to_disk(path)
    with pytest.raises(UserError, match="sample 1 has no value in 'y'"):
        hugging_face(path, "train", inputs="x", targets="y")


def test_damaged_image_is_named(tmp_path: Path, datasets_library: Any) -> None:
    path = str(tmp_path / "rows")
    columns: dict[str, Any] = {
        "image": datasets_library.Image(),
        "label": datasets_library.Value("int64"),
    }
    rows = {"image": [{"bytes": b"no image", "path": None}], "label": [0]}
    features = datasets_library.Features(columns)
    datasets_library.Dataset.from_dict(rows, features=features).save_to_disk(path)
    with pytest.raises(
        UserError,
        match="sample 0, column 'image' cannot be read as an image: its format is unknown",
    ):
        hugging_face(path, "train")[0]


def test_unreachable_hub_gives_one_line_error_soon(
    datasets_library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = datasets_library.config
    monkeypatch.setattr(config, "HF_ENDPOINT", "http://127.0.0.1:1")  # nothing listens there
    offline, start = config.HF_HUB_OFFLINE, time.monotonic()
    with pytest.raises(
        UserError, match=r"path='some/data' is not a local file .*cannot be reached"
    ) as caught:
        hugging_face("some/data", "train")
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 10
    assert offline == config.HF_HUB_OFFLINE


def test_empty_folder_gives_one_line_error(tmp_path: Path, datasets_library: Any) -> None:  # noqa: ARG001
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        hugging_face(str(tmp_path / "empty"), "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("module", [None, types.ModuleType("datasets")])
def test_missing_library_error_names_extra(
    monkeypatch: pytest.MonkeyPatch, module: types.ModuleType | None
) -> None:
    # None: not installed. An empty module: what a folder named `datasets` is imported as.
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.delitem(sys.modules, "datasets.load", raising=False)
    with pytest.raises(UserError, match=r"datasets is not installed.*\[hugging_face\]"):
        hugging_face("pets", "train")
