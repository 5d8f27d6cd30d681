"""Combinations of torch's learning rate schedulers that a configuration can name.

`torch.optim.lr_scheduler.SequentialLR` and `ChainedScheduler` take a list of schedulers that are
bound to the optimizer already. These functions take partial schedulers by name instead, so that
each of them can be changed on the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler, SequentialLR

SchedulerFactory = Callable[[Optimizer], LRScheduler]  # a node with `_partial_: true`


def sequential(
    optimizer: Optimizer, schedulers: Mapping[str, SchedulerFactory], milestones: Sequence[int]
) -> SequentialLR:
    """Run several schedulers one after the other.

    Args:
        optimizer: Optimizer whose learning rate is set.
        schedulers: Partial schedulers by name, in the order in which they run.
        milestones: Number of steps (or epochs) after which the next scheduler takes over; one
            fewer than there are schedulers.

    Raises:
        ValueError: If the number of milestones is wrong or a scheduler is not partial.
    """
    if len(milestones) != len(schedulers) - 1:
        raise ValueError(
            f"milestones={list(milestones)}: {len(schedulers)} schedulers need "
            f"{len(schedulers) - 1} of them"
        )
    return SequentialLR(optimizer, _build(optimizer, schedulers), list(milestones))


def chained(optimizer: Optimizer, schedulers: Mapping[str, SchedulerFactory]) -> ChainedScheduler:
    """Apply several schedulers at once: each multiplies the rate that the previous one returned.

    Args:
        optimizer: Optimizer whose learning rate is set.
        schedulers: Partial schedulers by name, in the order in which they are applied.

    Raises:
        ValueError: If a scheduler is not partial.
    """
    return ChainedScheduler(_build(optimizer, schedulers), optimizer)


def _build(optimizer: Optimizer, schedulers: Mapping[str, SchedulerFactory]) -> list[LRScheduler]:
    for name, scheduler in schedulers.items():
        if not callable(scheduler):
            raise ValueError(f"schedulers.{name} needs _partial_: true")
    return [scheduler(optimizer) for scheduler in schedulers.values()]
