"""Batches by configuration: streams, sampling, sizes, caches, windows."""

from __future__ import annotations

from pathlib import Path

import pytest

OWN = """
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset


def points(count):
    x = torch.randn(count, 2, generator=torch.Generator().manual_seed(0))
    return x, (x[:, 0] > 1).long()


def table(count: int):
    return TensorDataset(*points(count))


def turned(count: int):
    return TensorDataset(*points(count)[::-1])


class Stream(IterableDataset):
    def __init__(self, count: int, known: bool = False) -> None:
        self.count, self.known = count, known

    def __len__(self):
        if not self.known:
            raise TypeError
        return self.count

    def __iter__(self):
        return iter(zip(*points(self.count)))


class Dicts(Dataset):
    def __init__(self, count: int) -> None:
        self.points = points(count)

    def __len__(self):
        return len(self.points[0])

    def __getitem__(self, index):
        return {"x": self.points[0][index], "y": self.points[1][index]}
"""
CONF = """
defaults: [base/arrays@_here_, _self_]
name: own
path: null
channels: null
image_size: null
num_classes: 2
input_shape: [2]
normalize: null
batch_size: 16
source:
  train: {_target_: own_data.table, count: 100}
  valid: {_target_: own_data.table, count: 40}
"""
WORDS = ("--config-dir", "conf", "data=own", "model=mlp", "trusted_targets=[own_data]")
STREAM = ("data.source.train._target_=own_data.Stream", "trainer.max_epochs=2")


@pytest.fixture(autouse=True)
def own_data(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (elsewhere / "own_data.py").write_text(OWN)
    (elsewhere / "conf" / "data").mkdir(parents=True)
    (elsewhere / "conf" / "data" / "own.yaml").write_text(CONF)
    monkeypatch.syspath_prepend(elsewhere)
    return elsewhere
