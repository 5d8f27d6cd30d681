"""Handling of training steps whose loss or gradients are NaN or infinite."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from app.data.batch import BatchLoader
from app.distributed.collectives import rank
from app.runtime.errors import NonFiniteError
from app.runtime.host_copy import HostCopy
from app.training.accumulator import StageResult
from app.training.nonfinite_trace import batchnorm_buffers, copy_into, trace
from app.training.optim.finite_check import FiniteCheck
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

    If the decision was left to the device, its result is read some steps later. Until then the
    steps are pending, with their batches; all that follow a non-finite one are undone with it.

    Args:
        task: Task that is trained; its optimizers are used from the first epoch on.
        reads_every_step: Whether each step must be known to be finite before training continues,
            as is the case if a moving average is updated after it.
        stats: Counts and first occurrence, to be updated.

    Attributes:
        has_diverged: Whether training has ended because of a non-finite step.
    """

    def __init__(
        self, task: Task, reads_every_step: bool = False, stats: NonFiniteStats | None = None
    ) -> None:
        self.task, self.reads_every_step = task, reads_every_step
        self.stats = stats or NonFiniteStats()
        self.has_diverged = False
        self.pending: deque[PendingStep] = deque()  # the last one may still accumulate
        self.invalid_rows = self.epoch = 0
        self.loader: BatchLoader | None = None
        self.bn_buffers: list[Tensor] = []
        self.spare_copies: list[list[Tensor]] = []  # of the batch norm statistics

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint: plain values."""
        return {"has_diverged": self.has_diverged, "stats": dict(vars(self.stats))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.has_diverged = state["has_diverged"]
        vars(self.stats).update(state["stats"])

    @property
    def optimizers(self) -> OptimWrapperDict:
        assert self.task.optimizers is not None
        return self.task.optimizers

    @property
    def check(self) -> FiniteCheck:
        return self.optimizers.finite_check

    def on_epoch_start(self, loader: BatchLoader, epoch: int) -> None:
        """Prepare for an epoch of training; the loader may know the samples of each batch."""
        self.loader, self.epoch, self.invalid_rows = loader, epoch, 0
        self.bn_buffers, self.spare_copies = batchnorm_buffers(self.task.model), []
        self.pending.clear()
        self.optimizers.on_epoch_start(self.reads_every_step)

    def on_batch_start(self, batch: StepBatch, global_step: int) -> None:
        """Save what a step may have to restore, before its batch with that number in the run."""
        if self.check.policy is None:
            return
        if self.optimizers.at_step_boundary:
            self.pending.append(PendingStep(global_step, self._copy_bn_buffers()))
        self.pending[-1].batches.append(batch)

    def _copy_bn_buffers(self) -> list[Tensor]:
        if not self.bn_buffers:
            return []
        spare = self.spare_copies
        copies = spare.pop() if spare else [torch.empty_like(b) for b in self.bn_buffers]
        copy_into(copies, self.bn_buffers)
        return copies

    def on_batch_end(self) -> None:
        """Handle the result of the step, or of an earlier one that is known by now.

        Raises:
            NonFiniteError: If a step was not finite and the policy is to raise.
        """
        if not self.pending or not self.optimizers.at_step_boundary:
            return
        self.pending[-1].result = self.check.pop_result()
        is_known = isinstance(self.pending[-1].result, bool)
        while self.pending and (is_known or len(self.pending) > MAX_PENDING):
            self._handle_oldest()

    def sync(self) -> None:
        """Wait for the results of all steps so far, and handle them.

        Raises:
            NonFiniteError: If a step was not finite and the policy is to raise.
        """
        self.on_batch_end()
        while self.pending:
            self._handle_oldest()

    def pop_invalid_rows(self) -> int:
        """Return how many of the last rows to exclude, and reset that number."""
        count, self.invalid_rows = self.invalid_rows, 0
        return count

    def _handle_oldest(self) -> None:
        """Read the result of the oldest pending step; if it was skipped, undo all since then."""
        step = self.pending.popleft()
        if not step.was_skipped():
            if step.bn_buffers:
                self.spare_copies.append(step.bn_buffers)
            return
        self.invalid_rows += sum(len(item.batches) for item in (step, *self.pending))
        self.pending.clear()
        self.optimizers.undo_skipped()
        copy_into(self.bn_buffers, step.bn_buffers)
        self._follow_policy(step)

    def _follow_policy(self, step: PendingStep) -> None:
        """Count and report the step, and end training unless the policy is to skip it."""
        policy = self.check.policy
        if policy == "skip":
            self.stats.skipped += 1
            if self.stats.skipped > 1:  # only the first skipped step is worth another pass
                self.stats.count += 1
                return
        event = self._trace_event(step)
        self.stats.add(event)
        if policy == "raise":
            raise NonFiniteError(
                f"{event}; trainer.on_nonfinite=skip skips such steps, stop ends training"
            )
        self.has_diverged = policy == "stop"
        _warn_on_rank_zero(f"{'training ends' if self.has_diverged else 'skipped'}: {event}")

    def _trace_event(self, step: PendingStep) -> NonFiniteEvent:
        """Find out where the NaN or infinity comes from; all ranks must call this."""
        numbers = [batch.number for batch in step.batches]
        origin = trace(self.task, step.batches) or (numbers[-1], None, None, None)
        number, on_rank, kind, where = origin
        sample_indices = getattr(self.loader, "indices", None)
        samples = sample_indices(self.epoch, number) if sample_indices else None
        return NonFiniteEvent(
            "train",
            self.epoch,
            number,
            step.global_step + numbers.index(number),
            on_rank,
            kind,
            where,
            None if samples is None else samples[:MAX_LISTED_SAMPLES].tolist(),
        )

    def on_stage_end(
        self, result: StageResult, is_training: bool, is_whole_epoch: bool = True
    ) -> None:
        """Report what was skipped in an epoch, or which losses of an evaluation are not finite.

        Training ends if every step of a whole epoch was skipped.
        """
        if not is_training:
            self._report_evaluation(result)
        elif self.check.policy == "skip":
            self._report_skipped(result, is_whole_epoch)

    def _report_skipped(self, result: StageResult, is_whole_epoch: bool) -> None:
        if not result.steps.empty:  # only rank 0 has the table
            skipped = int((result.steps["num_samples"] == 0).sum())
            if skipped:
                log.warning("epoch %d: skipped %d batches", result.epoch, skipped)
        if is_whole_epoch and self.stats.skipped and not result.row["total_samples"]:
            self.has_diverged = True
            _warn_on_rank_zero(f"training ends: all steps of epoch {result.epoch} were skipped")

    def _report_evaluation(self, result: StageResult) -> None:
        if result.steps.empty or not self.task.has_eval_loss:
            return  # only rank 0 has the table
        losses, counts = result.steps["loss"], result.steps["num_samples"]
        steps = result.steps["iter"][~np.isfinite(losses) & (counts > 0)]
        if len(steps):
            event = NonFiniteEvent(result.stage, result.epoch, int(steps.iloc[0]), kind="loss")
            more = f", and in {len(steps) - 1} more of its steps" if len(steps) > 1 else ""
            self.stats.add(event, len(steps))
            log.warning("%s%s", event, more)


@dataclass
class PendingStep:
    """State from before an optimizer step, kept until the step is known to be finite.

    Attributes:
        global_step: Number of its first batch in the run, counted from 1.
        bn_buffers: Batch norm statistics before the step.
        batches: Batches of the step.
        result: Whether the step was refused, or a copy that is not 0 if the device skipped it.
    """

    global_step: int
    bn_buffers: list[Tensor]
    batches: list[StepBatch] = field(default_factory=list)
    result: HostCopy | bool = False

    def was_skipped(self) -> bool:
        """Return whether an optimizer has skipped the step, after waiting for the device."""
        result = self.result
        return result if isinstance(result, bool) else bool(result.get())


@dataclass(frozen=True)
class NonFiniteEvent:
    """A step whose loss or gradients are NaN or infinite.

    Attributes:
        stage: `train`, `valid` or `test`.
        epoch: Counted from 1.
        step: Number of the batch in the epoch, counted from 1.
        global_step: Number of the batch in the run, counted from 1; None in evaluation.
        rank: Rank whose part of the batch it was; None if unknown.
        kind: `loss` or `gradient`, whichever was not finite first; None if unknown.
        where: Module, parameter or gradient that it comes from; None if unknown.
        samples: Dataset indices of the batch; None if unknown.
    """

    stage: str
    epoch: int
    step: int
    global_step: int | None = None
    rank: int | None = None
    kind: str | None = None
    where: str | None = None
    samples: list[int] | None = None

    def __str__(self) -> str:
        total = f" (step {self.global_step} of the run)" if self.global_step else ""
        on_rank = f", rank {self.rank}" if self.rank is not None else ""
        where = f"; it comes from {self.where}" if self.where else ""
        samples = self.samples or []
        more = ", ..." if len(samples) > MAX_SHOWN_SAMPLES else ""
        shown = ", ".join(map(str, samples[:MAX_SHOWN_SAMPLES])) + more
        return (
            f"the {self.kind or 'loss or a gradient'} is not finite in {self.stage}, "
            f"epoch {self.epoch}, step {self.step}{total}{on_rank}{where}"
            f"{f'; samples {shown}' if samples else ''}"
        )


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


def _warn_on_rank_zero(text: str) -> None:
    if rank() == 0:
        log.warning("%s", text)
