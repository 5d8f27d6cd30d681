"""Handling of training steps whose loss or gradients are NaN or infinite."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from app.data.batch import BatchLoader
from app.distributed.collectives import rank
from app.runtime.errors import NonFiniteError
from app.training.accumulator import StageResult
from app.training.nonfinite_trace import (
    GRADIENT,
    LOSS,
    batchnorm_buffers,
    clone_all,
    copy_into,
    trace,
)
from app.training.optim.finite_check import AsyncScalar, FiniteCheck
from app.training.optim.optim_wrapper import OptimWrapperDict
from app.training.rank_sync import StepBatch
from app.training.task import Task

log = logging.getLogger(__name__)
MAX_PENDING = 8  # steps after which the host reads a result of the device, which is done by then
MAX_LISTED_SAMPLES = 1024  # sample indices in `status.json`
MAX_SHOWN_SAMPLES = 8  # sample indices in messages


class NonFinitePolicy:
    """Stops training, skips the step or raises if a step is not finite.

    `FiniteCheck` keeps such a step from changing the weights. This class restores what the step
    has changed otherwise (batch norm statistics, learning rates, step counts), finds out where the
    NaN or infinity comes from, reports it, and excludes the step from the tables.

    If the check runs on the device (see `FiniteCheck`), the host reads each result some steps
    later; the steps in between are pending, and are undone with the non-finite one.

    Args:
        task: Task that is trained; its optimizers are used from the first epoch on.
        syncs_every_step: Whether each step must be known to be finite before training continues,
            as is the case if a moving average is updated after it.
        stats: Counts and first occurrence, to be updated.

    Attributes:
        has_diverged: Whether training has ended because of a non-finite step.
    """

    def __init__(
        self, task: Task, syncs_every_step: bool = False, stats: NonFiniteStats | None = None
    ) -> None:
        self.task, self.syncs_every_step = task, syncs_every_step
        self.stats = stats or NonFiniteStats()
        self.has_diverged = False
        self.pending: deque[PendingStep] = deque()
        self.current: PendingStep | None = None
        self.invalid_rows = self.steps_taken = self.steps_skipped = self.epoch = 0
        self.sample_indices: Callable[[int, int], Tensor | None] = _no_indices
        self.bn_buffers: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint: plain values."""
        counts = {"steps_taken": self.steps_taken, "steps_skipped": self.steps_skipped}
        return {**counts, "has_diverged": self.has_diverged, "stats": self.stats.to_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.steps_taken, self.steps_skipped = state["steps_taken"], state["steps_skipped"]
        self.has_diverged = state["has_diverged"]
        self.stats.load_dict(state["stats"])

    def on_epoch_start(self, loader: BatchLoader, epoch: int, is_resumed: bool) -> None:
        """Prepare for an epoch of training.

        Args:
            loader: Loader of the training data, which may know the samples of each batch.
            epoch: Epoch that starts, counted from 1.
            is_resumed: Whether the epoch was interrupted and now continues.
        """
        self.epoch = epoch
        if not is_resumed:
            self.steps_taken, self.steps_skipped, self.has_diverged = 0, 0, False
        self.current, self.invalid_rows = None, 0
        self.pending.clear()
        self.sample_indices = getattr(loader, "indices", _no_indices)
        self.bn_buffers = batchnorm_buffers(self.task.model)
        if self.finite_check is not None:
            self.finite_check.reset(self.syncs_every_step)

    @property
    def optimizers(self) -> OptimWrapperDict:
        assert self.task.optimizers is not None
        return self.task.optimizers

    @property
    def finite_check(self) -> FiniteCheck | None:
        return self.optimizers.finite_check

    def on_batch_start(self, batch: StepBatch, global_step: int) -> None:
        """Save what the next training step may have to restore.

        Args:
            batch: Batch of the step.
            global_step: Number of the batch in the run, counted from 1.
        """
        if self.finite_check is None:
            return
        if self.current is None:
            snapshot = {} if self.finite_check.syncs else self.optimizers.snapshot()
            buffers = clone_all(self.bn_buffers)
            self.current = PendingStep(batch.number, global_step, buffers, snapshot)
        self.current.batches.append(batch)

    def on_batch_end(self) -> None:
        """Handle the result of the step, or of an earlier one that is known by now.

        Raises:
            NonFiniteError: If a step was not finite and the policy is to raise.
        """
        step, check = self.current, self.finite_check
        if check is None or step is None or not self.optimizers.at_step_boundary:
            return
        self.current = None
        if check.pop_skipped():
            self._handle(step, check)
            return
        self.steps_taken += 1
        if check.found_inf is not None:
            step.found_inf = AsyncScalar(check.found_inf)
            self.pending.append(step)
            if len(self.pending) > MAX_PENDING:
                self._check_oldest(check)

    def on_epoch_end(self, is_complete: bool) -> None:
        """Handle all pending steps, and end training if every step of the epoch was skipped.

        Args:
            is_complete: Whether the epoch ran to its end; if not, later steps may be finite.

        Raises:
            NonFiniteError: If a step was not finite and the policy is to raise.
        """
        self.on_batch_end()
        self.sync()
        if self.steps_skipped:
            _warn_on_rank_zero(
                f"epoch {self.epoch}: skipped {self.steps_skipped} steps that were not finite"
            )
        if is_complete and self.steps_skipped and not self.steps_taken and not self.has_diverged:
            self.has_diverged = True
            _warn_on_rank_zero(f"training ends: all steps of epoch {self.epoch} were skipped")

    def sync(self) -> None:
        """Wait for the results of all pending steps, and handle them."""
        while self.pending and self.finite_check is not None:
            self._check_oldest(self.finite_check)

    def pop_invalid_rows(self) -> int:
        """Return how many of the last rows to exclude, and reset that number."""
        count, self.invalid_rows = self.invalid_rows, 0
        return count

    def check_eval(self, result: StageResult) -> None:
        """Warn if losses of an evaluation stage are not finite."""
        if result.steps.empty:
            return  # only rank 0 has the table
        losses, counts = result.steps["loss"], result.steps["num_samples"]
        steps = result.steps["iter"][~np.isfinite(losses) & (counts > 0)]
        if len(steps):
            event = NonFiniteEvent(result.stage, result.epoch, int(steps.iloc[0]))
            more = f", and in {len(steps) - 1} more of its steps" if len(steps) > 1 else ""
            self.stats.add(event, len(steps))
            log.warning("%s%s", event, more)

    def _check_oldest(self, check: FiniteCheck) -> None:
        """Read the result of the oldest pending step; if it was not finite, undo all later ones."""
        step = self.pending.popleft()
        assert step.found_inf is not None
        if math.isfinite(step.found_inf.read()):
            return
        later = [*self.pending, *([self.current] if self.current else [])]
        self.pending.clear()
        self.current = None
        check.latch()
        self.optimizers.restore(step.optimizer_snapshot)
        self.invalid_rows += sum(len(item.batches) for item in later)
        self._handle(step, check)

    def _handle(self, step: PendingStep, check: FiniteCheck) -> None:
        self.invalid_rows += len(step.batches)
        copy_into(self.bn_buffers, step.bn_buffers)
        if check.policy != "skip" or not self.stats.skipped:
            event = self._trace_event(step)
        else:  # only the first skipped step is worth another pass
            event = NonFiniteEvent("train", self.epoch, step.step, step.global_step)
        self.stats.add(event)
        if check.policy == "raise":
            raise NonFiniteError(
                f"{event}; trainer.on_nonfinite=skip skips such steps, stop ends training"
            )
        if check.policy == "stop":
            self.has_diverged = True
        else:
            self.steps_skipped += 1
            self.stats.skipped += 1
        if self.has_diverged or self.stats.skipped == 1:
            _warn_on_rank_zero(f"{'training ends' if self.has_diverged else 'skipped'}: {event}")

    def _trace_event(self, step: PendingStep) -> NonFiniteEvent:
        """Find out where the NaN or infinity comes from; all ranks must call this."""
        source = trace(self.task, step.batches)
        index = source.batch_index if source else len(step.batches) - 1
        number, total = step.step + index, step.global_step + index
        indices = self.sample_indices(self.epoch, number)
        samples = None if indices is None else indices[:MAX_LISTED_SAMPLES].tolist()
        loss_only = any(wrapper.checks_loss_only for wrapper in self.optimizers.wrappers.values())
        kind = LOSS if loss_only else GRADIENT
        event = NonFiniteEvent("train", self.epoch, number, total, kind=kind, samples=samples)
        if source is None:
            return event
        return replace(event, rank=source.rank, kind=source.kind, where=source.where)


@dataclass
class PendingStep:
    """State from before an optimizer step, kept until the step is known to be finite.

    Attributes:
        step: Number of its first batch in the epoch, counted from 1.
        global_step: Number of its first batch in the run, counted from 1.
        bn_buffers: Batch norm statistics before the step.
        optimizer_snapshot: Learning rates and step counts before the step; empty if the result is
            read at once.
        batches: Batches of the step.
        found_inf: Result on its way to the host; None until the step is made.
    """

    step: int
    global_step: int
    bn_buffers: list[Tensor]
    optimizer_snapshot: dict[str, Any]
    batches: list[StepBatch] = field(default_factory=list)
    found_inf: AsyncScalar | None = None


@dataclass(frozen=True)
class NonFiniteEvent:
    """A step whose loss or gradients are NaN or infinite.

    Attributes:
        stage: `train`, `valid` or `test`.
        epoch: Counted from 1.
        step: Number of the batch in the epoch, counted from 1.
        global_step: Number of the batch in the run, counted from 1; None in evaluation.
        rank: Rank whose part of the batch it was; None if unknown.
        kind: `loss` or `gradient`, whichever was not finite first.
        where: Module, parameter or gradient that it comes from; None if unknown.
        samples: Dataset indices of the batch; None if unknown.
    """

    stage: str
    epoch: int
    step: int
    global_step: int | None = None
    rank: int | None = None
    kind: str = "loss"
    where: str | None = None
    samples: list[int] | None = None

    def __str__(self) -> str:
        total = f" (step {self.global_step} of the run)" if self.global_step else ""
        on_rank = f", rank {self.rank}" if self.rank is not None else ""
        where = f"; it comes from {self.where}" if self.where else ""
        text = (
            f"the {self.kind} is not finite in {self.stage}, epoch {self.epoch}, "
            f"step {self.step}{total}{on_rank}{where}"
        )
        shown = ", ".join(map(str, (self.samples or [])[:MAX_SHOWN_SAMPLES]))
        more = ", ..." if len(self.samples or []) > MAX_SHOWN_SAMPLES else ""
        return text + (f"; samples {shown}{more}" if shown else "")


@dataclass
class NonFiniteStats:
    """Counts of non-finite steps, as in `status.json`.

    Attributes:
        count: Number of non-finite steps in all stages.
        skipped: Number of training steps that were skipped.
        first: Fields of the first event.
    """

    count: int = 0
    skipped: int = 0
    first: dict[str, Any] | None = None

    def add(self, event: NonFiniteEvent, count: int = 1) -> None:
        """Count `count` steps, the first of which is `event`."""
        self.count += count
        self.first = self.first or vars(event)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_dict(self, values: dict[str, Any]) -> None:
        """Restore the values that `to_dict` returned."""
        self.count, self.skipped, self.first = values["count"], values["skipped"], values["first"]


def _warn_on_rank_zero(text: str) -> None:
    if rank() == 0:
        log.warning("%s", text)


def _no_indices(epoch: int, step: int) -> Tensor | None:  # noqa: ARG001
    """Stand in for `indices` of loaders that do not know the samples of a batch."""
    return None
