"""MNIST from the files in the package."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from app.data.idx import read_idx
from app.data.mnist import MD5, mnist
from app.data.split import dataset_size
from app.runtime.errors import UserError
from tests.support.toy_datasets import MNIST_DIR, copy_mnist_with_flipped_bit


def test_mnist_has_all_samples_and_known_class_counts() -> None:
    images, labels = mnist(train=False).tensors
    assert images.shape == (10_000, 1, 28, 28)
    assert images.dtype == torch.uint8
    assert labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert dataset_size(mnist(train=True)) == 60_000


@pytest.mark.parametrize("name", MD5)
def test_included_file_is_the_published_one(name: str) -> None:
    read_idx(MNIST_DIR / f"{name}.gz", MD5[name])


def test_mnist_with_flipped_bit_is_refused_by_md5(tmp_path: Path) -> None:
    copy_mnist_with_flipped_bit(tmp_path, "t10k-labels-idx1-ubyte.gz", 100)
    with pytest.raises(UserError, match=r"t10k-labels.*is damaged: its content has MD5"):
        mnist(train=False, root=str(tmp_path))


@pytest.mark.parametrize("num_bytes", [0, 5, 1000])
def test_truncated_mnist_is_refused(tmp_path: Path, num_bytes: int) -> None:
    for file in MNIST_DIR.glob("t10k*.gz"):
        shutil.copy(file, tmp_path)
    path = tmp_path / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(UserError, match="is damaged: it ends too early"):
        mnist(train=False, root=str(tmp_path))
