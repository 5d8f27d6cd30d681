"""Small files for every `data=` that reads files of the user."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.image_files import write_coco_folder, write_image_folder, write_mask_folder

MASK_GROUPS = ("model=unet", "loss=dice_ce", "metric=segmentation", "goal.metric=mean_iou")


def write_data(name: str, folder: Path) -> list[str]:
    """Write files for `data=<name>` into a folder, and return the overrides that use them."""
    writers = {
        "coco": _write_boxes,
        "csv": _write_csv,
        "npz": _write_npz,
        "image_folder": _write_images,
        "masks": _write_masks,
        "hugging_face": _write_hugging_face,
    }
    return writers[name](folder) if name in writers else []


def _write_csv(folder: Path) -> list[str]:
    rows = [f"{index},{index * 2},{index % 3}" for index in range(30)]
    (folder / "x.csv").write_text("\n".join(["a,b,label", *rows]))
    return ["data.path=x.csv", "model=mlp"]


def _write_npz(folder: Path) -> list[str]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 28, 28), dtype=np.uint8)
    np.savez(folder / "x.npz", x=images, y=np.arange(30) % 3)
    return ["data.path=x.npz"]


def _write_images(folder: Path) -> list[str]:
    write_image_folder(folder / "pets" / "train", {"cat": 20, "dog": 20})
    write_image_folder(folder / "pets" / "test", {"cat": 4, "dog": 4}, seed=1)
    return ["data.path=pets", "data.image_size=16"]


def _write_boxes(folder: Path) -> list[str]:
    write_coco_folder(folder / "boxed", 20)
    groups = ("task=detection", "model=fcos", "loss=none", "metric=detection", "goal.metric=map")
    return ["data.path=boxed", "data.image_size=32", *groups]


def _write_masks(folder: Path) -> list[str]:
    write_mask_folder(folder / "street", 20)
    return ["data.path=street", "data.image_size=16", *MASK_GROUPS]


def _write_hugging_face(folder: Path) -> list[str]:
    datasets = pytest.importorskip("datasets")
    write_image_folder(folder / "files", {"cat": 20, "dog": 20})
    rows = {
        "image": [str(path) for path in sorted((folder / "files").rglob("*.png"))],
        "label": [0] * 20 + [1] * 20,
    }
    label = datasets.ClassLabel(names=["cat", "dog"])
    features = datasets.Features({"image": datasets.Image(), "label": label})
    train = datasets.Dataset.from_dict(rows, features=features)
    saved = datasets.DatasetDict(train=train, test=train.select(range(4)))
    saved.save_to_disk(str(folder / "saved"))
    return ["data.path=saved", "data.image_size=16"]
