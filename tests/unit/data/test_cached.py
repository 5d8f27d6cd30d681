"""Datasets that are read once and cached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from app.data.cached import cached
from app.runtime.errors import UserError
from tests.support.toy_datasets import CountingDataset, array_dataset


def test_cached_reads_every_sample_once() -> None:
    dataset = array_dataset()
    x, y = cached(dataset).tensors
    assert dataset.reads == 5
    assert (x.shape, x.dtype, x[:, 0, 0].tolist()) == ((5, 2, 3), torch.float32, [0, 1, 2, 3, 4])
    assert (y.dtype, y.tolist()) == (torch.int64, [0, 1, 2, 3, 4])


def test_cached_does_not_advance_global_generator() -> None:
    before = torch.get_rng_state()
    cached(array_dataset())
    assert torch.equal(torch.get_rng_state(), before)


def test_cached_reads_existing_file_instead_of_dataset(tmp_path: Path) -> None:
    file = str(tmp_path / "folder" / "cache.npz")
    first = cached(array_dataset(), file).tensors
    dataset = array_dataset()
    second = cached(dataset, file).tensors
    assert dataset.reads == 0
    for read, loaded in zip(first, second, strict=True):
        assert read.dtype == loaded.dtype
        assert torch.equal(read, loaded)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["cache.npz"]


@pytest.mark.parametrize("damage", ["truncated", "bit", "empty", "array", "names", "objects"])
def test_cached_refuses_damaged_file(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "cache.npz"
    cached(array_dataset(), str(file))
    content = file.read_bytes()
    flipped = content.index(np.full(6, 1, np.float32).tobytes())
    if damage == "array":
        with file.open("wb") as opened:
            np.save(opened, np.zeros(5))
    elif damage == "names":
        np.savez(file, inputs=np.zeros(5))
    elif damage == "objects":
        np.savez(file, inputs=np.array([{}] * 5), targets=np.zeros(5))
    else:
        bit = content[:flipped] + bytes([content[flipped] ^ 1]) + content[flipped + 1 :]
        file.write_bytes({"truncated": content[:-30], "empty": b"", "bit": bit}[damage])
    with pytest.raises(UserError, match=r"cache\.npz.*delete .*cache\.npz to read"):
        cached(array_dataset(), str(file))


def test_cached_refuses_file_with_other_number_of_samples(tmp_path: Path) -> None:
    file = str(tmp_path / "cache.npz")
    cached(array_dataset(5), file)
    with pytest.raises(UserError, match=r"inputs of shape \[5, 2, 3\], but the dataset has 6"):
        cached(array_dataset(6), file)


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        ([torch.zeros(2, 3), torch.zeros(3, 2)], [0, 1], r"sample 1: inputs have shape \[3, 2\]"),
        ([torch.zeros(2), torch.zeros(2)], [0, 0.5], r"sample 1: targets .*torch\.float32"),
        ([Image.new("L", (2, 2))], [0], r"sample 0 \(Image, int\) cannot be converted to tensors"),
        ([], [], "no samples"),
    ],
)
def test_cached_refuses_samples_of_different_shapes_or_types(
    inputs: list[Any], targets: list[Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        cached(CountingDataset(inputs, targets))
