"""Arrays and tables of the user."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from app.data.arrays import csv, npz
from app.runtime.errors import UserError


def test_npz_reads_images_and_tables(tmp_path: Path) -> None:
    path = str(tmp_path / "a.npz")
    np.savez(
        path, x=np.zeros((4, 8, 8, 3), np.uint8), y=np.arange(4, dtype=np.int8), t=np.ones((4, 2))
    )
    images, labels = npz(path, "x", "y", channels_last=True).tensors
    assert (images.shape, images.dtype) == ((4, 3, 8, 8), torch.uint8)
    assert labels.dtype == torch.int64
    assert npz(path, "t", "y").tensors[0].dtype == torch.float32


def test_npz_errors_name_missing_array_length_and_file(tmp_path: Path) -> None:
    path = str(tmp_path / "a.npz")
    np.savez(path, images=np.zeros((4, 2)), y=np.zeros(3))
    with pytest.raises(
        UserError, match=r"no array 'image'; available: images, y; did you mean 'images'"
    ):
        npz(path, "image", "y")
    with pytest.raises(UserError, match="'images' has 4 samples, but 'y' has 3"):
        npz(path, "images", "y")
    with pytest.raises(UserError, match="is not a file"):
        npz(str(tmp_path / "none.npz"), "x", "y")


def test_csv_reads_numbers_and_classes(tmp_path: Path) -> None:
    path = str(tmp_path / "a.csv")
    pd.DataFrame({"a": [1, 2], "b": [0.5, 1.5], "label": ["dog", "cat"]}).to_csv(path, index=False)
    x, y = csv(path, "label", classes=["cat", "dog"]).tensors
    assert x.tolist() == [[1.0, 0.5], [2.0, 1.5]]
    assert y.tolist() == [1, 0]
    assert csv(path, "b", features=["a"], regression=True).tensors[1].tolist() == [[0.5], [1.5]]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("a,label\n1,0\n,1\n", {}, r"line 3, column 'a' is empty, one of 1 such cells"),
        ("a,label\n1,\n2,1\n", {}, "line 2, column 'label' is empty"),
        ("a,label\n1,\n2,cat\n", {}, "line 2, column 'label' is empty"),
        ("a,p,label\n1,,0\n2,x,1\n", {"group": "p"}, "line 2, column 'p' is empty"),
        ("a,label\n1,0\nx,1\n", {}, "line 3, column 'a': x is not a finite number"),
        (
            "a,hue,size,label\n1,red,,0\n2,,big,1\n",
            {},
            r"columns with text instead of numbers: hue, size; encode them first, for example with "
            r"pandas\.get_dummies, or leave them out: data\.source\.train\.features=\[a\]$",
        ),
        ("a,lable\n1,0\n", {}, "no column 'label'; available: a, lable; did you mean 'lable'"),
        ("a,label\n1,0.5\n", {}, r"0\.5, which is not a class .* experiment=csv_regression"),
        ("a,label\n1,cow\n", {"classes": ["cat"]}, "unknown class 'cow'; data.class_names allows"),
        ("a,label\n1,cow\n", {"classes": None}, "contains names, such as 'cow'; set data.class_na"),
        ("a,label\n1,0\n1,cow\n", {"regression": True}, "column 'label': cow is not a finite"),
        ("", {}, "cannot be read as a table"),
    ],
)
def test_csv_errors_name_line_column_and_value(
    tmp_path: Path, text: str, options: dict[str, Any], message: str
) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        csv(str(path), "label", **options)
