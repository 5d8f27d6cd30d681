"""What all ranks do in the loop at the same time, so that none waits for another in vain."""

from __future__ import annotations

import time
from collections.abc import Iterator

from torch import Tensor

from app.data.batch import Batch, BatchLoader
from app.distributed.collectives import LazyAllReduceMax, gather_object, is_distributed
from app.runtime.nested import Nested, map_tensors
from app.runtime.signals import StopReason, StopSignal


class StopConsensus:
    """Why to stop, the same in all ranks.

    Args:
        stop: Whom this rank hears.

    Attributes:
        reason: As far as all ranks know.
    """

    def __init__(self, stop: StopSignal) -> None:
        self.stop, self.agreement = stop, LazyAllReduceMax()
        self.reason = StopReason.NONE

    def after_step(self) -> StopReason:
        """What is known after a step; every rank must ask."""
        self.reason = StopReason(max(self.reason, self.agreement(self.stop.reason())))
        return self.reason

    def finish(self) -> StopReason:
        """No further step comes: what was last said counts now."""
        self.reason = StopReason(max(self.reason, self.agreement.wait(self.stop.reason())))
        return self.reason

    @property
    def is_signal(self) -> bool:
        """Whether nothing more is to be begun; when time is up, the best is still tested."""
        return self.reason > StopReason.TIME


class SaveTimer:
    """When to save in the midst of an epoch: after the same step in all ranks.

    Args:
        every_n_steps: Of the optimizer; None: not by steps.
        every_n_minutes: Since it was last saved; None: not by the clock.
    """

    def __init__(self, every_n_steps: int | None, every_n_minutes: float | None) -> None:
        self.every_n_steps = every_n_steps
        self.seconds = None if every_n_minutes is None else 60 * every_n_minutes
        self.agreement = LazyAllReduceMax()
        self.since, self.steps = time.monotonic(), 0

    def mark_saved(self, steps: int) -> None:
        """It has been, after so many steps."""
        self.since, self.steps = time.monotonic(), steps

    def is_due(self, steps: int) -> bool:
        """Whether it is time to, after so many steps; every rank must ask."""
        is_late = False
        if self.seconds is not None:
            is_late = bool(self.agreement(int(time.monotonic() - self.since >= self.seconds)))
        by_steps = self.every_n_steps is not None and steps % self.every_n_steps == 0
        return (by_steps or is_late) and steps != self.steps


def padded_batches(batches: BatchLoader, epoch: int) -> Iterator[tuple[Batch, bool]]:
    """The batches of this rank, and whether it is only lent: it has no sample of the whole one.

    All ranks make every step together, so a rank without a part in it gets something to go through
    the motions with.
    """
    for batch in batches.epoch(epoch):
        yield (batches.first(2), True) if batch is None else (batch, False)


def gather_batches(mine: Nested, is_padding: bool) -> list[Nested]:
    """What every rank has, on the host, in rank 0; nothing in the others."""
    if not is_distributed():
        return [mine]
    parts = gather_object(None if is_padding else map_tensors(Tensor.cpu, mine))
    return [part for part in parts if part is not None]
