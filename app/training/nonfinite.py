"""What follows a step of training whose loss or gradients are no numbers."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from app.data.batch import Batch, BatchLoader
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
from app.training.task import Task

log = logging.getLogger(__name__)
LAG = 8  # steps after which the host looks at what the device has found: it is long there
LISTED = 1024  # indices of samples at most


@dataclass
class PendingStep:
    """What is known of the time before a step of the optimizers, until that is known to be good."""

    step: int
    global_step: int
    buffers: list[Tensor]
    position: dict[str, Any]
    batches: list[tuple[Batch, bool]] = field(default_factory=list)
    flag: AsyncScalar | None = None


class NonFinitePolicy:
    """Follows the steps of training, and sees to those that the guard has refused.

    Args:
        task: With its learning, once training begins.
        waits: What else follows steps, as an average of the weights, must not follow a bad one; so
            nobody goes on before it is known.

    Attributes:
        record: For `status.json`.
        has_diverged: Training has ended here.
    """

    def __init__(self, task: Task, waits: bool = False) -> None:
        self.task, self.waits, self.stats = task, waits, NonFiniteStats()
        self.has_diverged = False
        self.held: deque[PendingStep] = deque()
        self.moment: PendingStep | None = None
        self.void = self.made = self.skipped = self.epoch = 0
        self.indices: Callable[[int, int], Tensor | None] = _unknown
        self.buffers: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        counts = {"made": self.made, "skipped": self.skipped}
        return {**counts, "has_diverged": self.has_diverged, "record": self.stats.to_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self.made, self.skipped = state["made"], state["skipped"]
        self.has_diverged = state["has_diverged"]
        self.stats.load_dict(state["record"])

    def on_epoch_start(self, batches: BatchLoader, epoch: int, goes_on: bool) -> None:
        """An epoch of training begins, or goes on."""
        self.epoch = epoch
        if not goes_on:
            self.made, self.skipped, self.has_diverged = 0, 0, False
        self.moment, self.void = None, 0
        self.held.clear()
        self.indices = getattr(batches, "indices", _unknown)
        self.buffers = batchnorm_buffers(self.task.model)
        if self.finite_check is not None:
            self.finite_check.is_latched, self.finite_check.found_inf = False, None
            self.finite_check.syncs = self.finite_check.syncs or self.waits

    @property
    def optimizers(self) -> OptimWrapperDict:
        assert self.task.optimizers is not None
        return self.task.optimizers

    @property
    def finite_check(self) -> FiniteCheck | None:
        return self.optimizers.finite_check

    def on_batch_start(self, batch: Batch, lent: bool, step: int, global_step: int) -> None:
        """A batch is about to be learned from."""
        if self.finite_check is None:
            return
        if self.moment is None:
            position = {} if self.finite_check.syncs else self.optimizers.snapshot()
            self.moment = PendingStep(step, global_step, clone_all(self.buffers), position)
        self.moment.batches.append((batch, lent))

    def on_batch_end(self) -> None:
        """It has been; where that made a step, it may turn out that one was bad.

        Raises:
            NonFiniteError: So it is, and that ends the run.
        """
        moment, guard = self.moment, self.finite_check
        if guard is None or moment is None or not self.optimizers.at_step_boundary:
            return
        self.moment = None
        if guard.skipped:
            self._see_to(moment, guard)
            return
        self.made += 1
        if guard.found_inf is not None:
            moment.flag = AsyncScalar(guard.found_inf)
            self.held.append(moment)
            if len(self.held) > LAG:
                self._look(guard)

    def on_epoch_end(self, is_whole: bool) -> None:
        """No further step comes: nothing stays open. Only a whole epoch had no good step."""
        self.on_batch_end()
        self.sync()
        if self.skipped:
            _say(f"epoch {self.epoch}: {self.skipped} steps were skipped")
        if is_whole and self.skipped and not self.made and not self.has_diverged:
            self.has_diverged = True
            _say(f"training ends: no step of epoch {self.epoch} could be made")

    def sync(self) -> None:
        """At all that the device has found out; waits for it."""
        while self.held and self.finite_check is not None:
            self._look(self.finite_check)

    def num_invalid_rows(self) -> int:
        """How many of the last rows are to count nothing; asked once for each."""
        count, self.void = self.void, 0
        return count

    def _look(self, guard: FiniteCheck) -> None:
        """At what the device has found out about the earliest step that is still open."""
        moment = self.held.popleft()
        assert moment.flag is not None
        if math.isfinite(moment.flag.read()):
            return
        later = [*self.held, *([self.moment] if self.moment else [])]
        self.held.clear()
        self.moment = None
        guard.is_latched = True
        self.optimizers.restore(moment.position)
        self.void += sum(len(one.batches) for one in later)
        self._see_to(moment, guard)

    def _see_to(self, moment: PendingStep, guard: FiniteCheck) -> None:
        guard.skipped = False
        self.void += len(moment.batches)
        copy_into(self.buffers, moment.buffers)
        if guard.policy != "skip" or not self.stats.skipped:
            bad = self._named(moment)
        else:
            bad = NonFiniteEvent("train", self.epoch, moment.step, moment.global_step)
        self.stats.add(bad)
        if guard.policy == "raise":
            raise NonFiniteError(
                f"{bad}; trainer.on_nonfinite=skip leaves out such steps, stop ends training"
            )
        if guard.policy == "stop":
            self.has_diverged = True
        else:
            self.skipped += 1
            self.stats.skipped += 1
        if self.has_diverged or self.stats.skipped == 1:
            _say(f"{'training ends' if self.has_diverged else 'skipped'}: {bad}")

    def _named(self, moment: PendingStep) -> NonFiniteEvent:
        """Where it comes from; every rank must ask."""
        origin = trace(self.task, moment.batches)
        place = origin.batch_index if origin else len(moment.batches) - 1
        step, total = moment.step + place, moment.global_step + place
        indices = self.indices(self.epoch, step)
        samples = None if indices is None else indices[:LISTED].tolist()
        by_loss = any(one.checks_loss_only for one in self.optimizers.wrappers.values())
        kind = LOSS if by_loss else GRADIENT
        bad = NonFiniteEvent("train", self.epoch, step, total, kind=kind, samples=samples)
        if origin is None:
            return bad
        return replace(bad, rank=origin.rank, kind=origin.kind, where=origin.where)

    def check_eval(self, result: StageResult) -> None:
        """Looks at the losses of a stage that learns nothing."""
        if result.steps.empty:
            return  # another rank than 0
        losses, counts = result.steps["loss"], result.steps["num_samples"]
        steps = result.steps["iter"][~np.isfinite(losses) & (counts > 0)]
        if len(steps):
            bad = NonFiniteEvent(result.stage, result.epoch, int(steps.iloc[0]))
            more = f", and in {len(steps) - 1} more of its steps" if len(steps) > 1 else ""
            self.stats.add(bad, len(steps))
            log.warning("%s%s", bad, more)


def _say(text: str) -> None:
    """Once, though all ranks know."""
    if rank() == 0:
        log.warning("%s", text)


def _unknown(epoch: int, step: int) -> Tensor | None:  # noqa: ARG001
    """Streams do not tell which samples a batch has."""
    return None


SHOWN = 8  # indices of samples at most, in words


@dataclass(frozen=True)
class NonFiniteEvent:
    """A step that was no number; `step` counts batches of the epoch from 1, `global_step` all."""

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
        words = [f"the {self.kind} is no number in {self.stage}, epoch {self.epoch}, step "]
        words += [f"{self.step}{total}", f", rank {self.rank}" if self.rank is not None else ""]
        words += [f"; it comes from {self.where}" if self.where else ""]
        shown = ", ".join(map(str, (self.samples or [])[:SHOWN]))
        more = ", ..." if len(self.samples or []) > SHOWN else ""
        return "".join(words) + (f"; samples {shown}{more}" if shown else "")


@dataclass
class NonFiniteStats:
    """What `status.json` says of it.

    Attributes:
        count: Steps of any stage that were no numbers.
        skipped: Steps of training that were left out.
        first: Of them all.
    """

    count: int = 0
    skipped: int = 0
    first: dict[str, Any] | None = None

    def add(self, bad: NonFiniteEvent, count: int = 1) -> None:
        """So many, that one the first of them."""
        self.count += count
        self.first = self.first or vars(bad)

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return dict(vars(self))

    def load_dict(self, plain: dict[str, Any]) -> None:
        """Goes on from what `plain` gave."""
        self.count, self.skipped, self.first = plain["count"], plain["skipped"], plain["first"]
