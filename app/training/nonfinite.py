"""Handling of training steps whose loss or gradients are NaN or infinite."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from app.data.batch import BatchLoader
from app.distributed.collectives import rank
from app.runtime.errors import NonFiniteError
from app.training.accumulator import StageResult
from app.training.nonfinite_event import NonFiniteEvent, NonFiniteStats
from app.training.nonfinite_trace import batchnorm_buffers, clone_all, copy_into, trace
from app.training.optim.finite_check import FiniteCheck, StepResult
from app.training.optim.optim_wrapper import OptimWrapperDict
from app.training.rank_sync import StepBatch
from app.training.task import Task

log = logging.getLogger(__name__)
MAX_PENDING = 8  # steps after which the host reads a result of the device, which is done by then
MAX_LISTED_SAMPLES = 1024  # sample indices in `status.json`


class NonFinitePolicy:
    """Stops training, skips the step or raises if a step is not finite.

    `FiniteCheck` keeps such a step from changing the weights. This class restores what the step
    has changed otherwise (batch norm statistics, learning rates, step counts), finds out where the
    NaN or infinity comes from, reports it, and excludes the step from the tables.

    If the decision was left to the device, its result is read some steps later. Until then the
    steps are pending; all that follow a non-finite one are undone with it.

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
        self.pending: deque[PendingStep] = deque()
        self.current: PendingStep | None = None
        self.invalid_rows = self.epoch = 0
        self.loader: BatchLoader | None = None
        self.bn_buffers: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint: plain values."""
        return {"has_diverged": self.has_diverged, "stats": self.stats.to_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.has_diverged = state["has_diverged"]
        self.stats.load_dict(state["stats"])

    @property
    def optimizers(self) -> OptimWrapperDict:
        assert self.task.optimizers is not None
        return self.task.optimizers

    @property
    def check(self) -> FiniteCheck:
        return self.optimizers.finite_check

    def on_epoch_start(self, loader: BatchLoader, epoch: int) -> None:
        """Prepare for an epoch of training.

        Args:
            loader: Loader of the training data, which may know the samples of each batch.
            epoch: Epoch that starts, counted from 1.
        """
        self.loader, self.epoch = loader, epoch
        self.current, self.invalid_rows = None, 0
        self.pending.clear()
        self.bn_buffers = batchnorm_buffers(self.task.model)
        self.check.reset(self.reads_every_step)

    def on_batch_start(self, batch: StepBatch, global_step: int) -> None:
        """Save what the next training step may have to restore.

        Args:
            batch: Batch of the step.
            global_step: Number of the batch in the run, counted from 1.
        """
        if self.check.policy is None:
            return
        if self.current is None:
            buffers = clone_all(self.bn_buffers)
            self.current = PendingStep(global_step, buffers)
        self.current.batches.append(batch)

    def on_batch_end(self) -> None:
        """Handle the result of the step, or of an earlier one that is known by now.

        Raises:
            NonFiniteError: If a step was not finite and the policy is to raise.
        """
        step = self.current
        if step is None or not self.optimizers.at_step_boundary:
            return
        self.current, step.results = None, self.check.pop_results()
        self.pending.append(step)
        while self.pending and (step.is_known or len(self.pending) > MAX_PENDING):
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

    def on_stage_end(
        self, result: StageResult, is_training: bool, is_whole_epoch: bool = True
    ) -> None:
        """Report what was skipped in an epoch, or which losses of an evaluation are not finite.

        Training ends if every step of a whole epoch was skipped.
        """
        if is_training:
            self._report_skipped(result, is_whole_epoch)
        else:
            self._report_eval(result)

    def _report_skipped(self, result: StageResult, is_whole_epoch: bool) -> None:
        if self.check.policy != "skip":
            return
        if not result.steps.empty:  # only rank 0 has the table
            skipped = int((result.steps["num_samples"] == 0).sum())
            if skipped:
                log.warning("epoch %d: skipped %d batches", result.epoch, skipped)
        if is_whole_epoch and self.stats.skipped and not result.row["total_samples"]:
            self.has_diverged = True
            _warn_on_rank_zero(f"training ends: all steps of epoch {result.epoch} were skipped")

    def _report_eval(self, result: StageResult) -> None:
        if result.steps.empty or not self.task.has_eval_loss:
            return  # only rank 0 has the table
        losses, counts = result.steps["loss"], result.steps["num_samples"]
        steps = result.steps["iter"][~np.isfinite(losses) & (counts > 0)]
        if len(steps):
            event = NonFiniteEvent(result.stage, result.epoch, int(steps.iloc[0]), kind="loss")
            more = f", and in {len(steps) - 1} more of its steps" if len(steps) > 1 else ""
            self.stats.add(event, len(steps))
            log.warning("%s%s", event, more)

    def _handle_oldest(self) -> None:
        """Read the result of the oldest pending step; if it was skipped, undo all since then."""
        step = self.pending.popleft()
        if not step.was_skipped():
            return
        undone = [step, *self.pending]
        self.pending.clear()
        for result in reversed([result for item in undone for result in item.results]):
            if result.was_skipped():
                result.undo()
        copy_into(self.bn_buffers, step.bn_buffers)
        self.invalid_rows += sum(len(item.batches) for item in undone)
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
        unknown = NonFiniteEvent("train", self.epoch, numbers[-1])
        event = trace(self.task, self.epoch, step.batches) or unknown
        sample_indices = getattr(self.loader, "indices", None)
        samples = sample_indices(self.epoch, event.step) if sample_indices else None
        return replace(
            event,
            global_step=step.global_step + numbers.index(event.step),
            samples=None if samples is None else samples[:MAX_LISTED_SAMPLES].tolist(),
        )


@dataclass
class PendingStep:
    """State from before an optimizer step, kept until the step is known to be finite.

    Attributes:
        global_step: Number of its first batch in the run, counted from 1.
        bn_buffers: Batch norm statistics before the step.
        batches: Batches of the step.
        results: What happened to the step of each optimizer.
    """

    global_step: int
    bn_buffers: list[Tensor]
    batches: list[StepBatch] = field(default_factory=list)
    results: list[StepResult] = field(default_factory=list)

    @property
    def is_known(self) -> bool:
        """Whether the host knows without waiting if an optimizer has skipped the step."""
        known = [result.was_skipped() for result in self.results if result.is_known]
        return any(known) or len(known) == len(self.results)

    def was_skipped(self) -> bool:
        """Return whether an optimizer has skipped the step, after waiting for the device."""
        return any(result.was_skipped() for result in self.results)


def _warn_on_rank_zero(text: str) -> None:
    if rank() == 0:
        log.warning("%s", text)
