"""Which samples come when: a function of (seed, epoch) alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from app.data.sampling import draw
from app.runtime.errors import UserError
from app.runtime.seed import seed_of


@dataclass(frozen=True)
class Order:
    """Which samples come when.

    Attributes:
        total: Samples in the dataset.
        count: How many of them an epoch takes.
        shuffle_seed: None keeps the dataset's own order.
        weights: How likely each sample is, drawn with replacement; None takes each once.
    """

    total: int
    count: int
    shuffle_seed: int | None
    weights: Tensor | None = None

    @classmethod
    def limited(
        cls,
        total: int,
        batch_size: int,
        limit: int | float | None,
        shuffle_seed: int | None,
        weights: Tensor | None = None,
    ) -> Order:
        """The order of as many batches as `limit` says: a number, a share, or None for all."""
        batches = -(-total // batch_size)
        wanted = max(1, int(limit * batches)) if isinstance(limit, float) else limit
        count = total if wanted is None else min(total, wanted * batch_size)
        return cls(total, count, shuffle_seed, weights)

    def of_whole_batches(self, batch_size: int) -> Order:
        """The same without a short last batch.

        Raises:
            UserError: Nothing is left.
        """
        count = self.count - self.count % batch_size
        if count == 0:
            raise UserError(f"data.drop_last: {self.count} samples make no batch of {batch_size}")
        return replace(self, count=count)

    @property
    def is_plain(self) -> bool:
        """Whether samples come as they stand in the dataset."""
        return self.shuffle_seed is None

    def indices(self, epoch: int) -> Tensor:
        """Positions in the dataset, int64."""
        if self.shuffle_seed is None:
            return torch.arange(self.count)
        seed = seed_of(self.shuffle_seed, "order", epoch)
        if self.weights is not None:
            return draw(self.weights, self.count, seed)
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(self.total, generator=generator)[: self.count]

    def of_batch(self, epoch: int, step: int, batch_size: int) -> Tensor:
        """Those of one batch of the epoch, counted from 1; of all ranks together."""
        return self.indices(epoch)[(step - 1) * batch_size : step * batch_size]
