"""What all ranks must do together in the loop: stop, save, and make the same number of steps."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from app.data.batch import Batch, BatchLoader
from app.distributed.collectives import LazyAllReduceMax, gather_object, is_distributed
from app.runtime.nested import Nested, map_tensors
from app.runtime.signals import StopReason, StopSignal, TrainingInterrupted


class StopConsensus:
    """Agrees over all ranks on whether to stop, so that they stop after the same step.

    Args:
        signal: Stop requests that this rank has received.

    Attributes:
        reason: Strongest reason of any rank, as far as it has been exchanged.
    """

    def __init__(self, signal: StopSignal) -> None:
        self.signal, self.all_ranks = signal, LazyAllReduceMax()
        self.reason = self.requested = StopReason.NONE

    def request(self, reason: StopReason) -> None:
        """Ask all ranks to stop after a step; any rank may call this."""
        self.requested = reason

    def after_step(self) -> StopReason:
        """Return the reason to stop after this step; all ranks must call this."""
        self.reason = StopReason(max(self.reason, self.all_ranks(self._local_reason())))
        return self.reason

    def finish(self) -> StopReason:
        """Return the reason to stop after the last step of a stage, waiting for all ranks."""
        reason = self.all_ranks.wait(self._local_reason())
        self.reason = StopReason(max(self.reason, reason))
        return self.reason

    def until_signal(self, batches: Iterable[StepBatch]) -> Iterator[StepBatch]:
        """Yield the batches until a signal requests to stop; all ranks must call this."""
        for batch in batches:
            yield batch
            self.after_step()
            if self.is_signal:
                break
        self.finish()

    def raise_if_signal(self) -> None:
        """Raise if a signal has requested to stop.

        Raises:
            TrainingInterrupted: A signal has requested to stop.
        """
        if self.is_signal:
            raise TrainingInterrupted(self.reason)

    def _local_reason(self) -> StopReason:
        return max(self.requested, self.signal.reason())

    @property
    def is_signal(self) -> bool:
        """Whether to stop at once; for any other reason, the best weights are still tested."""
        return self.reason > StopReason.TIME


class SaveTimer:
    """Decides when to save within an epoch: after the same step on all ranks.

    Args:
        every_n_steps: Optimizer steps between two saves; None does not save by steps.
        every_n_minutes: Minutes between two saves; None does not save by time.
    """

    def __init__(self, every_n_steps: int | None, every_n_minutes: float | None) -> None:
        self.every_n_steps = every_n_steps
        self.seconds = None if every_n_minutes is None else 60 * every_n_minutes
        self.all_ranks = LazyAllReduceMax()
        self.last_save_time, self.last_save_step = time.monotonic(), 0

    def mark_saved(self, steps: int) -> None:
        """Record that a checkpoint was saved after `steps` optimizer steps."""
        self.last_save_time, self.last_save_step = time.monotonic(), steps

    def is_due(self, steps: int) -> bool:
        """Return whether to save after `steps` optimizer steps; all ranks must call this."""
        by_time = False
        if self.seconds is not None:
            is_late = time.monotonic() - self.last_save_time >= self.seconds
            by_time = bool(self.all_ranks(int(is_late)))
        by_steps = self.every_n_steps is not None and steps % self.every_n_steps == 0
        return (by_steps or by_time) and steps != self.last_save_step


@dataclass(frozen=True)
class StepBatch:
    """Batch of one step on this rank.

    Attributes:
        data: Inputs and targets, on the device.
        number: Number of the batch in the epoch, counted from 1.
        is_padding: Whether this rank has no samples in the step, so that the batch does not count.
        seconds: How long this rank waited for it.
    """

    data: Batch
    number: int
    is_padding: bool = False
    seconds: float = 0.0


def step_batches(loader: BatchLoader, epoch: int) -> Iterator[StepBatch]:
    """Yield the batches of this rank.

    All ranks must make every step, as they exchange gradients in it. A rank without samples in a
    step gets two samples of the dataset as padding, which do not count.
    """
    batches, number = iter(loader.epoch(epoch)), 0
    while True:
        started = time.perf_counter()
        try:
            data = next(batches)
        except StopIteration:
            return
        number, seconds = number + 1, time.perf_counter() - started
        is_padding = data is None
        yield StepBatch(loader.first(2) if data is None else data, number, is_padding, seconds)


def gather_batches(local: Nested, is_padding: bool) -> list[Nested]:
    """Return the parts of all ranks in rank 0, on the host and without padding.

    Other ranks get an empty list. On a single device the part is returned as it is.
    """
    if not is_distributed():
        return [local]
    parts = gather_object(None if is_padding else map_tensors(Tensor.cpu, local))
    return [part for part in parts if part is not None]
