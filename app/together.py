"""What all ranks do in the loop at the same time, so that none waits for another in vain."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from app.data.batch import Batch, Batches
from app.distributed import Agreement, alone, gathered
from app.nested import Nested, map_tensors
from app.stopping import Reason, Stop


class Asked:
    """Why to stop, the same in all ranks.

    Args:
        stop: Whom this rank hears.

    Attributes:
        reason: As far as all ranks know.
    """

    def __init__(self, stop: Stop) -> None:
        self.stop, self.agreement = stop, Agreement()
        self.reason = Reason.NONE

    def after_step(self) -> Reason:
        """What is known after a step; every rank must ask."""
        self.reason = Reason(max(self.reason, self.agreement(self.stop.reason())))
        return self.reason

    def settle(self) -> Reason:
        """No further step comes: what was last said counts now."""
        self.reason = Reason(max(self.reason, self.agreement.settle(self.stop.reason())))
        return self.reason

    @property
    def by_signal(self) -> bool:
        """Whether nothing more is to be begun; when time is up, the best is still tested."""
        return self.reason > Reason.TIME


def lending(batches: Batches, epoch: int) -> Iterator[tuple[Batch, bool]]:
    """The batches of this rank, and whether it is only lent: it has no sample of the whole one.

    All ranks make every step together, so a rank without a part in it gets something to go through
    the motions with.
    """
    for batch in batches.epoch(epoch):
        yield (batches.first(2), True) if batch is None else (batch, False)


def of_all_ranks(mine: Nested, lent: bool) -> list[Nested]:
    """What every rank has, on the host, in rank 0; nothing in the others."""
    if alone():
        return [mine]
    parts = gathered(None if lent else map_tensors(Tensor.cpu, mine))
    return [part for part in parts if part is not None]
