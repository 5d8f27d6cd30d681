"""A dataset module and a data configuration as a user would write them."""

from __future__ import annotations

from pathlib import Path

MODULE = """
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset


def points(count):
    x = torch.randn(count, 2, generator=torch.Generator().manual_seed(0))
    return x, (x[:, 0] > 1).long()


def table(count: int):
    return TensorDataset(*points(count))


def targets_first(count: int):
    return TensorDataset(*points(count)[::-1])


class Stream(IterableDataset):
    def __init__(self, count: int, has_length: bool = False) -> None:
        self.count, self.has_length = count, has_length

    def __len__(self):
        if not self.has_length:
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
DATA_CONFIG = """
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
OWN_DATA = ("--config-dir", "conf", "data=own", "model=mlp", "trusted_targets=[own_data]")
STREAM = ("data.source.train._target_=own_data.Stream", "trainer.max_epochs=2")


def write_own_data(folder: Path) -> None:
    """Write the module `own_data` and the configuration `data=own` into the folder."""
    (folder / "own_data.py").write_text(MODULE)
    (folder / "conf" / "data").mkdir(parents=True)
    (folder / "conf" / "data" / "own.yaml").write_text(DATA_CONFIG)
