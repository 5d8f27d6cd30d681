"""Several optimizers that step together, such as Muon for matrices and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer


class ChainedOptimizer(Optimizer):
    """Steps several optimizers of different parameters as one.

    Its parameter groups are those of the optimizers, and its state is theirs: schedules, gradient
    scalers and checkpoints need to know no more.

    Args:
        optimizers: Optimizers whose parameters are disjoint.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = list(optimizers)
        self.counts = [len(optimizer.param_groups) for optimizer in optimizers]
        super().__init__([g for optimizer in optimizers for g in optimizer.param_groups], {})
        self._share_state()

    def _share_state(self) -> None:
        """Let the optimizers use the parameter groups and the state of this one."""
        groups = iter(self.param_groups)
        for optimizer, count in zip(self.optimizers, self.counts, strict=True):
            optimizer.param_groups = [next(groups) for _ in range(count)]
            optimizer.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step each optimizer; a closure is not supported."""
        assert closure is None
        for optimizer in self.optimizers:
            optimizer.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share_state()


def classes_of_groups(optimizer: Optimizer) -> list[str]:
    """Return the name of the class of optimizer that trains each parameter group."""
    if not isinstance(optimizer, ChainedOptimizer):
        return [type(optimizer).__name__] * len(optimizer.param_groups)
    return [name for member in optimizer.optimizers for name in classes_of_groups(member)]
