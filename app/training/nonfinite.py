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

from app.data.batch import Batch, Batches
from app.distributed.collectives import rank
from app.runtime.errors import NonFiniteError
from app.training.accumulator import StageResult
from app.training.nonfinite_trace import GRADIENT, LOSS, copied, norm_buffers, origin_of, put_back
from app.training.optim.finite_check import Flag, Guard
from app.training.optim.optim_wrapper import Learning
from app.training.task import Task

log = logging.getLogger(__name__)
LAG = 8  # steps after which the host looks at what the device has found: it is long there
LISTED = 1024  # indices of samples at most


@dataclass
class Moment:
    """What is known of the time before a step of the optimizers, until that is known to be good."""

    step: int
    global_step: int
    buffers: list[Tensor]
    position: dict[str, Any]
    batches: list[tuple[Batch, bool]] = field(default_factory=list)
    flag: Flag | None = None


class NonFinite:
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
        self.task, self.waits, self.record = task, waits, Record()
        self.has_diverged = False
        self.held: deque[Moment] = deque()
        self.moment: Moment | None = None
        self.void = self.made = self.skipped = self.epoch = 0
        self.indices: Callable[[int, int], Tensor | None] = _unknown
        self.buffers: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        counts = {"made": self.made, "skipped": self.skipped}
        return {**counts, "has_diverged": self.has_diverged, "record": self.record.plain()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self.made, self.skipped = state["made"], state["skipped"]
        self.has_diverged = state["has_diverged"]
        self.record.take_up(state["record"])

    def begin(self, batches: Batches, epoch: int, goes_on: bool) -> None:
        """An epoch of training begins, or goes on."""
        self.epoch = epoch
        if not goes_on:
            self.made, self.skipped, self.has_diverged = 0, 0, False
        self.moment, self.void = None, 0
        self.held.clear()
        self.indices = getattr(batches, "indices", _unknown)
        self.buffers = norm_buffers(self.task.model)
        if self.guard is not None:
            self.guard.is_over, self.guard.evidence = False, None
            self.guard.reads = self.guard.reads or self.waits

    @property
    def learning(self) -> Learning:
        assert self.task.learning is not None
        return self.task.learning

    @property
    def guard(self) -> Guard | None:
        return self.learning.guard

    def before(self, batch: Batch, lent: bool, step: int, global_step: int) -> None:
        """A batch is about to be learned from."""
        if self.guard is None:
            return
        if self.moment is None:
            position = {} if self.guard.reads else self.learning.position()
            self.moment = Moment(step, global_step, copied(self.buffers), position)
        self.moment.batches.append((batch, lent))

    def after(self) -> None:
        """It has been; where that made a step, it may turn out that one was bad.

        Raises:
            NonFiniteError: So it is, and that ends the run.
        """
        moment, guard = self.moment, self.guard
        if guard is None or moment is None or not self.learning.is_between_steps:
            return
        self.moment = None
        if guard.refused:
            self._see_to(moment, guard)
            return
        self.made += 1
        if guard.evidence is not None:
            moment.flag = Flag(guard.evidence)
            self.held.append(moment)
            if len(self.held) > LAG:
                self._look(guard)

    def settle(self, is_whole: bool) -> None:
        """No further step comes: nothing stays open. Only a whole epoch had no good step."""
        self.after()
        self.look_at_all()
        if self.skipped:
            _say(f"epoch {self.epoch}: {self.skipped} steps were skipped")
        if is_whole and self.skipped and not self.made and not self.has_diverged:
            self.has_diverged = True
            _say(f"training ends: no step of epoch {self.epoch} could be made")

    def look_at_all(self) -> None:
        """At all that the device has found out; waits for it."""
        while self.held and self.guard is not None:
            self._look(self.guard)

    def void_rows(self) -> int:
        """How many of the last rows are to count nothing; asked once for each."""
        count, self.void = self.void, 0
        return count

    def _look(self, guard: Guard) -> None:
        """At what the device has found out about the earliest step that is still open."""
        moment = self.held.popleft()
        assert moment.flag is not None
        if math.isfinite(moment.flag.read()):
            return
        later = [*self.held, *([self.moment] if self.moment else [])]
        self.held.clear()
        self.moment = None
        guard.is_over = True
        self.learning.put_back(moment.position)
        self.void += sum(len(one.batches) for one in later)
        self._see_to(moment, guard)

    def _see_to(self, moment: Moment, guard: Guard) -> None:
        guard.refused = False
        self.void += len(moment.batches)
        put_back(self.buffers, moment.buffers)
        if guard.policy != "skip" or not self.record.skipped:
            bad = self._named(moment)
        else:
            bad = Bad("train", self.epoch, moment.step, moment.global_step)
        self.record.add(bad)
        if guard.policy == "raise":
            raise NonFiniteError(
                f"{bad}; trainer.on_nonfinite=skip leaves out such steps, stop ends training"
            )
        if guard.policy == "stop":
            self.has_diverged = True
        else:
            self.skipped += 1
            self.record.skipped += 1
        if self.has_diverged or self.record.skipped == 1:
            _say(f"{'training ends' if self.has_diverged else 'skipped'}: {bad}")

    def _named(self, moment: Moment) -> Bad:
        """Where it comes from; every rank must ask."""
        origin = origin_of(self.task, moment.batches)
        place = origin.place if origin else len(moment.batches) - 1
        step, total = moment.step + place, moment.global_step + place
        indices = self.indices(self.epoch, step)
        samples = None if indices is None else indices[:LISTED].tolist()
        by_loss = any(one.by_loss for one in self.learning.optimizations.values())
        kind = LOSS if by_loss else GRADIENT
        bad = Bad("train", self.epoch, step, total, kind=kind, samples=samples)
        if origin is None:
            return bad
        return replace(bad, rank=origin.rank, kind=origin.kind, where=origin.where)

    def measured(self, result: StageResult) -> None:
        """Looks at the losses of a stage that learns nothing."""
        if result.steps.empty:
            return  # another rank than 0
        losses, counts = result.steps["loss"], result.steps["num_samples"]
        steps = result.steps["iter"][~np.isfinite(losses) & (counts > 0)]
        if len(steps):
            bad = Bad(result.stage, result.epoch, int(steps.iloc[0]))
            more = f", and in {len(steps) - 1} more of its steps" if len(steps) > 1 else ""
            self.record.add(bad, len(steps))
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
class Bad:
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
class Record:
    """What `status.json` says of it.

    Attributes:
        count: Steps of any stage that were no numbers.
        skipped: Steps of training that were left out.
        first: Of them all.
    """

    count: int = 0
    skipped: int = 0
    first: dict[str, Any] | None = None

    def add(self, bad: Bad, count: int = 1) -> None:
        """So many, that one the first of them."""
        self.count += count
        self.first = self.first or vars(bad)

    def plain(self) -> dict[str, Any]:
        """As plain values."""
        return dict(vars(self))

    def take_up(self, plain: dict[str, Any]) -> None:
        """Goes on from what `plain` gave."""
        self.count, self.skipped, self.first = plain["count"], plain["skipped"], plain["first"]
