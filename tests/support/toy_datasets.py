"""Small datasets for tests of loaders, caches and windows."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

MNIST_DIR = Path(__file__).parents[2] / "app" / "data" / "mnist"


def arange_dataset(count: int = 10) -> TensorDataset:
    """Inputs 0, 1, ... of shape (1,), with their remainders modulo 3 as labels."""
    return TensorDataset(torch.arange(count).float()[:, None], torch.arange(count) % 3)


class NoisyDataset(Dataset[Any]):
    """Seven samples that draw from the generators of torch and NumPy."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> Any:
        return torch.rand(1) + np.random.rand() + index, index


class CountingDataset(Dataset[tuple[Tensor, Any]]):
    """The given samples; `reads` counts how often one was read."""

    def __init__(self, inputs: Sequence[Any], targets: Sequence[Any]) -> None:
        self.samples, self.reads = list(zip(inputs, targets, strict=True)), 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        self.reads += 1
        return self.samples[index]


def array_dataset(count: int = 5) -> CountingDataset:
    """Sample i is a float32 array of shape (2, 3) filled with i, with i as its target."""
    return CountingDataset([np.full((2, 3), i, np.float32) for i in range(count)], range(count))


def copy_mnist_with_flipped_bit(folder: Path, name: str, position: int) -> None:
    """Copy the files of MNIST, and flip a bit in the content of one of them."""
    for file in MNIST_DIR.glob("*.gz"):
        shutil.copy(file, folder)
    content = bytearray(gzip.decompress((folder / name).read_bytes()))
    content[position] ^= 1
    (folder / name).write_bytes(gzip.compress(bytes(content)))
