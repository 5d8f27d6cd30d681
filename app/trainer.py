"""The loop: when to train, validate, save and stop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch

from app.callbacks.callback import Callback, EpochEnd, StageStart
from app.config.schema import Goal
from app.data.loaders import Batch, Batches
from app.history import best, measured, reason_to_stop
from app.records import Rows, StageResult
from app.seed import seed_everything
from app.state import TrainState
from app.task import SupervisedTask

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """How long to train, and what comes when.

    Attributes:
        max_epochs: None where `max_steps` ends it.
        max_steps: Of the optimizer; None where `max_epochs` ends it.
        valid_every_n_epochs: And after the last.
        save_every_n_epochs: And after the last.
        sanity_valid_batches: Validated before training.
    """

    max_epochs: int | None
    max_steps: int | None
    valid_every_n_epochs: int
    save_every_n_epochs: int
    sanity_valid_batches: int

    def epochs(self, steps_per_epoch: int) -> int:
        """Epochs at most, the last one perhaps cut short."""
        by_steps = (
            math.inf if self.max_steps is None else math.ceil(self.max_steps / steps_per_epoch)
        )
        return int(min(by_steps, math.inf if self.max_epochs is None else self.max_epochs))


class Trainer:
    """Trains, validates and tests a task.

    Args:
        task: What a step is.
        state: What training changes; its history grows with each stage.
        callbacks: Those who watch.
        goal: What best means.
        plan: How long.
        seed: Each epoch's randomness depends on it and the epoch alone.
        device: That the steps run on.
    """

    def __init__(
        self,
        task: SupervisedTask,
        state: TrainState,
        callbacks: Callback,
        goal: Goal,
        plan: Plan,
        seed: int,
        device: torch.device,
    ) -> None:
        self.task, self.state, self.callbacks = task, state, callbacks
        self.goal, self.plan, self.seed, self.device = goal, plan, seed, device

    def fit(self, train: Batches, valid: Batches | None) -> None:
        """Trains to the end of the plan, or until the goal stops it; leaves best.pt and last.pt."""
        began = time.monotonic()
        self.sanity_check(valid)
        last_epoch = self.plan.epochs(self.steps_per_epoch(train))
        for epoch in range(self.state.epoch + 1, last_epoch + 1):
            seed_everything(self.seed, "epoch", epoch)
            self.run_stage("train", epoch, train)
            self.state.epoch = epoch
            if valid is not None and self.is_due(epoch, self.plan.valid_every_n_epochs, last_epoch):
                self.run_stage("valid", epoch, valid)

            self.state.schedule.epoch_end(self.goal_value_of(epoch))
            reason = reason_to_stop(self.state.history, self.goal)
            if self.is_best(epoch):
                self.state.save_best()
            if reason or self.is_due(epoch, self.plan.save_every_n_epochs, last_epoch):
                self.state.save_last()

            self.callbacks.on_epoch_end(self.epoch_end(epoch, last_epoch, time.monotonic() - began))
            if reason:
                log.info("stopped after epoch %d: %s", epoch, reason)
                return

    def run_stage(self, stage: str, epoch: int, batches: Batches) -> StageResult:
        """One pass over the batches; its row joins the history, the watchers hear of it."""
        training = stage == "train"
        self.task.model.train(training)
        self.callbacks.on_stage_start(StageStart(stage, epoch, len(batches), batches.num_samples))
        rows = Rows(self.task.metrics[stage], self.device)
        if training:
            for batch in self.within_max_steps(batches.epoch(epoch)):
                lr = self.state.schedule.lr
                rows.add(self.task.train_step(batch), lr)
                self.callbacks.on_step_end(len(batch[-1]))
            self.state.optimization.finish()
        else:
            for batch in batches.epoch(epoch):
                rows.add(self.task.eval_step(stage, batch))
                self.callbacks.on_step_end(len(batch[-1]))
        result = rows.result(stage, epoch)
        self.state.history.append(result.row)
        self.callbacks.on_stage_end(result, self.state.history)
        return result

    def sanity_check(self, valid: Batches | None) -> None:
        """Validates a few batches, to fail before the first epoch rather than after it."""
        if valid is None or self.plan.sanity_valid_batches == 0:
            return
        self.task.model.eval()
        rows = Rows(self.task.metrics["valid"], self.device)
        for batch in islice(valid.epoch(0), self.plan.sanity_valid_batches):
            rows.add(self.task.eval_step("valid", batch))
        rows.result("valid", 0)

    def within_max_steps(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches up to the last step of the plan."""
        if self.plan.max_steps is None:
            return batches
        optimization = self.state.optimization
        return islice(batches, (self.plan.max_steps - optimization.steps) * optimization.accumulate)

    def steps_per_epoch(self, train: Batches) -> int:
        """Of the optimizer."""
        return math.ceil(len(train) / self.state.optimization.accumulate)

    def is_due(self, epoch: int, every: int, last_epoch: int) -> bool:
        """Whether something that comes every so many epochs, and after the last, comes now."""
        return epoch % every == 0 or epoch == last_epoch

    def is_best(self, epoch: int) -> bool:
        """Whether this epoch has the goal's best value so far."""
        found = best(self.state.history, self.goal)
        return found is not None and found.epoch == epoch

    def goal_value_of(self, epoch: int) -> float | None:
        """The goal's value in this epoch; None where it was not measured."""
        values = measured(self.state.history, self.goal)
        return values[-1].value if values and values[-1].epoch == epoch else None

    def epoch_end(self, epoch: int, last_epoch: int, elapsed: float) -> EpochEnd:
        """What the watchers are told."""
        return EpochEnd(
            epoch=epoch,
            history=self.state.history,
            goal=self.goal,
            epochs_left=last_epoch - epoch,
            valid_every=self.plan.valid_every_n_epochs,
            elapsed=elapsed,
        )
