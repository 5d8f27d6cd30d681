"""One small classification problem as every kind of dataset."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

X = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


class MapDataset(Dataset[tuple[Tensor, Tensor]]):
    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index], Y[index]


class StreamDataset(IterableDataset[tuple[Tensor, Tensor]]):
    """An iterable dataset of unknown length that records the epochs it is set to."""

    def __init__(self) -> None:
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(X, Y, strict=True))


class SizedStreamDataset(StreamDataset):
    def __len__(self) -> int:
        return len(X)


DATASETS = {
    "tensors": lambda: TensorDataset(X, Y),
    "map": MapDataset,
    "stream": StreamDataset,
    "sized stream": SizedStreamDataset,
    "loader": lambda: DataLoader(MapDataset(), batch_size=20),
    "stream loader": lambda: DataLoader(StreamDataset(), batch_size=20),
}
