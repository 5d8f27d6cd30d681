"""Several schedulers of torch as one, for configurations: parts by name, in their order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler, SequentialLR

Part = Callable[[Optimizer], LRScheduler]  # a node with `_partial_: true`


def sequential(
    optimizer: Optimizer, schedulers: Mapping[str, Part], milestones: Sequence[int]
) -> SequentialLR:
    """One scheduler after the other.

    Args:
        optimizer: Whose rate is set.
        schedulers: By name, in this order.
        milestones: The steps (or epochs) after which the next takes over; one fewer than parts.

    Raises:
        ValueError: Not one milestone fewer than schedulers.
    """
    if len(milestones) != len(schedulers) - 1:
        raise ValueError(
            f"milestones={list(milestones)}: {len(schedulers)} schedulers need "
            f"{len(schedulers) - 1} of them"
        )
    return SequentialLR(optimizer, _made(optimizer, schedulers), list(milestones))


def chained(optimizer: Optimizer, schedulers: Mapping[str, Part]) -> ChainedScheduler:
    """All schedulers at once: each multiplies what the one before it gave.

    Args:
        optimizer: Whose rate is set.
        schedulers: By name, in this order.
    """
    return ChainedScheduler(_made(optimizer, schedulers), optimizer)


def _made(optimizer: Optimizer, parts: Mapping[str, Part]) -> list[LRScheduler]:
    for name, part in parts.items():
        if not callable(part):
            raise ValueError(f"schedulers.{name} needs _partial_: true")
    return [part(optimizer) for part in parts.values()]
