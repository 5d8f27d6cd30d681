"""The loop: when to train, validate, save and stop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import count, islice
from pathlib import Path

import pandas as pd
import torch

from app.config.schema import GoalConfig, Job, MonitorConfig
from app.data.batch import Batch, Batches
from app.distributed.collectives import broadcast_object, rank, world_size
from app.distributed.strategies import SingleDevice
from app.runtime.errors import UserError
from app.runtime.nested import Nested, concat, count_samples, map_tensors
from app.runtime.seed import seed_everything
from app.runtime.signals import StopSignal, TrainingInterrupted
from app.training.accumulator import Rows, StageResult, nothing_of
from app.training.checkpoint.checkpoint import BEST
from app.training.checkpoint.mid_epoch import left, position, take_up
from app.training.checkpoint.policy import Keeping
from app.training.checkpoint.train_state import TrainState
from app.training.events import Callback, EpochEnd, StageStart, StepEnd
from app.training.history import State, goal_value, summary_table, value_in
from app.training.history import reason_to_stop as stop_by
from app.training.nonfinite import NonFinite
from app.training.oom import Memory
from app.training.optim.freezing import Freezing
from app.training.optim.optim_wrapper import Learning
from app.training.optim.weight_averaging import Averaging, measured_anew
from app.training.plan import Plan
from app.training.pruning import Pruning
from app.training.rank_sync import Asked, lending, of_all_ranks
from app.training.task import Step, Task, sound

log = logging.getLogger(__name__)
Stepped = tuple[Batch, Step, dict[str, float]]  # a batch, its step, further columns
TRAIN_LOSS, CPU = GoalConfig("train/loss", "min"), torch.device("cpu")
PREDICT = "predict"  # what watchers are told in place of a stage


class Trainer:
    """Trains, validates, tests and predicts with a task.

    Args:
        task: What a step is; its `learning` is set where it is to be trained.
        plan: How long.
        folder: Checkpoints go there.
        goal: What best means.
        callbacks: Those who watch.
        seed: Each epoch's randomness depends on it and the epoch alone.
        device: That the steps run on; the task is there already.
        averaging: Of the weights; it stands in wherever they are measured.
        freezing: Of some of them.
        monitors: Further meanings of best, by name.
        job: Its configuration goes into each checkpoint.
        parallel: How several ranks learn as one.
        stop: Who asks to end before the plan is over.
        pruning: What a search thinks of the run.
    """

    def __init__(
        self,
        task: Task,
        plan: Plan,
        folder: Path,
        goal: GoalConfig = TRAIN_LOSS,
        callbacks: Callback | None = None,
        seed: int = 0,
        device: torch.device = CPU,
        averaging: Averaging | None = None,
        freezing: Freezing | None = None,
        monitors: Mapping[str, MonitorConfig] | None = None,
        job: Job | None = None,
        parallel: SingleDevice | None = None,
        stop: StopSignal | None = None,
        pruning: Pruning | None = None,
    ) -> None:
        self.task, self.plan = task, plan
        self.callbacks, self.seed, self.device = callbacks or Callback(), seed, device
        self.averaging = averaging or Averaging(task.model)
        self.freezing = freezing or Freezing(task.model, {})
        self.state = TrainState(task, self.averaging, folder, job, self.callbacks, plan.saving)
        self.keeping = Keeping(self.state, plan.saving, goal, monitors or {})
        self.parallel, self.stop = parallel or SingleDevice(task.model), stop or StopSignal()
        self.asked = Asked(self.stop)
        self.pruning, self.is_hopeless = pruning or Pruning(None, goal), False
        self.nonfinite = NonFinite(task, waits=self.averaging.follows_steps)
        self.state.nonfinite = self.nonfinite
        self.memory = Memory(device, job.config if job else None)

    def fit(self, train: Batches, valid: Batches | None = None) -> pd.DataFrame:
        """Trains to the end of the plan, or until the goal stops it.

        Leaves `best.pt` and `last.pt`, and gives the summary: a line for each stage.

        Raises:
            Stopped: It was asked to end before its time; `last.pt` has what there is.
        """
        with self.stop.deferred_until_step(self.plan.max_seconds), self.state.written():
            try:
                self.keep_again(train)
                summary = self.fit_epochs(train, valid)
                self.stand_in(train)
            except TrainingInterrupted:
                self.keeping.last()
                self.state.writer.wait()
                broadcast_object(None)  # no rank leaves before it is saved
                raise
        return summary

    def fit_epochs(self, train: Batches, valid: Batches | None) -> pd.DataFrame:
        """Epoch after epoch."""
        began = time.monotonic()
        if self.is_over():
            log.warning("nothing to train: the plan was over after epoch %d", self.state.epoch)
            return summary_table(self.state.history)
        self.sanity_check(valid)
        for epoch in count(self.state.epoch + self.state.is_over):
            if self.state.is_over:
                self.run_stage("train", epoch, train, learns=True)
                self.state.epoch, self.state.is_over = epoch, False
                self.averaging.after_epoch(epoch)
            self.state.time_is_up = bool(self.asked.reason)
            last = self.plan.is_over(epoch, self.learning.steps) or self.state.time_is_up
            last = last or self.nonfinite.has_diverged

            with self.averaged(train, epoch):
                if valid is not None and (last or epoch % self.plan.valid_every_n_epochs == 0):
                    self.run_stage("valid", epoch, valid)
                self.keeping.best(epoch)
            self.learning.epoch_end(value_in(self.state.history, self.goal, epoch))
            self.state.is_over = True
            self.is_hopeless = self.pruning.is_hopeless(self.state.history) and not last
            reason = self.reason_to_stop()
            if last or reason or epoch % self.plan.saving.every_n_epochs == 0:
                self.keeping.last()

            self.callbacks.on_epoch_end(self.epoch_end(epoch, train, time.monotonic() - began))
            if reason:
                log.info("stopped after epoch %d: %s", epoch, reason)
            if last or reason:
                break
        return summary_table(self.state.history)

    def is_over(self) -> bool:
        """Whether training has come to its end already, in a run that goes on."""
        epoch, ended = self.state.epoch, self.state.is_over and self.state.under_way is None
        by_plan = self.plan.is_over(epoch, self.learning.steps) or self.state.time_is_up
        by_plan = by_plan or self.nonfinite.has_diverged
        return ended and (by_plan or (epoch > 0 and self.reason_to_stop() is not None))

    def run_stage(
        self, stage: str, epoch: int, batches: Batches, learns: bool = False
    ) -> StageResult:
        """One pass over the batches; its row joins the history, the watchers hear of it.

        What is drawn in it depends on the seed, the stage, the epoch and the rank alone.

        Raises:
            Stopped: In the midst of it.
        """
        start = self.starts(stage, epoch, batches)
        rows = Rows(self.task.metrics[stage], self.device)
        if learns and self.state.under_way:
            take_up(rows, self.state.under_way)
        whole = broadcast_object(self.callbacks.watches_all(start))
        run = self.train_steps if learns else self.eval_steps
        with self.stop.deferred_until_step():
            for batch, step, numbers in run(batches, stage, epoch):
                rows.add(step.values, numbers)
                rows.void(self.nonfinite.void_rows())
                self.tell(start, batch, step, whole)
                if learns and self.keeping.is_time():
                    self.save_under_way(rows)
        rows.void(self.nonfinite.void_rows())
        if rows.is_empty:
            raise UserError(f"the {stage} data gives no batch")
        if self.asked.by_signal and not learns:
            raise TrainingInterrupted(self.asked.reason)
        if self.asked.by_signal:
            self.state.under_way = position(rows, self.state.trained)
        result = rows.result(stage, epoch)
        if not learns:
            self.nonfinite.measured(result)
        history = [*self.state.history, result.row]
        result = replace(result, is_whole=not self.asked.by_signal)
        self.callbacks.on_stage_end(result, history)
        if self.asked.by_signal:
            raise TrainingInterrupted(
                self.asked.reason
            )  # the stage is not over, and not part of the history
        self.state.history = history
        return result

    def starts(self, stage: str, epoch: int, batches: Batches) -> StageStart:
        """A stage begins: seeds, and the watchers hear of it."""
        seed_everything(self.seed, stage, epoch, *([rank()] if rank() else []))
        start = StageStart(stage, epoch, batches.num_batches, batches.num_samples)
        self.callbacks.on_stage_start(start)
        return start

    def train_steps(self, batches: Batches, stage: str, epoch: int) -> Iterator[Stepped]:
        """Learns from each batch, until there are enough steps."""
        task, learning = self.task, self.learning
        task.model.train()
        self.freezing.apply(epoch)
        self.parallel.on_epoch_start()
        before, self.state.under_way = self.state.under_way, None
        self.state.trained = before["batches"] if before else 0
        self.nonfinite.begin(batches, epoch, before is not None)
        is_over = self.has_enough_steps or self.nonfinite.has_diverged
        for batch, lent in left(batches, epoch, before) if not is_over else ():
            self.state.trained += 1
            self.state.batches += 1
            task.starts(epoch, self.state.batches)
            rates = learning.rates()
            self.nonfinite.before(batch, lent, self.state.trained, self.state.batches)
            with (
                self.memory.watched(stage, epoch, self.state.trained),
                self.counting(stage, lent),
                self.parallel.sync_context(lent, learning.completes),
            ):
                step = sound(task, stage, task.train_step(batch))
            self.nonfinite.after()
            self.averaging.after_step(epoch, learning.steps)
            row = {**step.values, **learning.norms(step.num_samples)}
            values = nothing_of(row) if lent else row
            yield batch, Step(values, step.outputs), {**step.numbers, **rates}
            asked = self.asked.after_step()
            if self.nonfinite.has_diverged:
                break
            if (asked or self.has_enough_steps) and learning.is_between_steps:
                break
        learning.finish()
        self.asked.settle()
        self.nonfinite.settle(is_whole=not self.asked.by_signal)
        self.averaging.after_step(epoch, learning.steps)
        self.parallel.on_epoch_end()

    def eval_steps(self, batches: Batches, stage: str, epoch: int) -> Iterator[Stepped]:
        """Measures each batch."""
        self.task.model.eval()
        for number, (batch, lent) in enumerate(lending(batches, epoch), start=1):
            told = self.memory.watched(stage, epoch, number)
            with told, torch.no_grad(), self.counting(stage, lent):
                step = sound(self.task, stage, self.task.eval_step(stage, batch))
            yield batch, Step(nothing_of(step.values), step.outputs) if lent else step, {}
            self.asked.after_step()
            if self.asked.by_signal:
                break
        self.asked.settle()

    @contextmanager
    def counting(self, stage: str, lent: bool) -> Iterator[None]:
        """In the precision of the forward pass; a lent batch counts nothing."""
        muted = self.task.metrics[stage].muted() if lent else nullcontext()
        with muted, self.task.precision.autocast():
            yield

    def tell(self, start: StageStart, batch: Batch, step: Step, whole: bool) -> None:
        """The watchers hear of a step; where they want so, of all ranks' parts of it."""
        parts = of_all_ranks((batch, step.outputs), not step.num_samples) if whole else []
        if parts or not whole:
            told = concat(parts) if parts else (batch, step.outputs)
            count = step.num_samples * world_size()
            self.callbacks.on_step_end(StepEnd(start.stage, start.epoch, count, *told))

    def evaluate(
        self, batches: Batches, stage: str = "test", epoch: int | None = None
    ) -> pd.DataFrame:
        """Measures the weights as they are; gives the stage's line of the summary.

        Args:
            batches: Gone through once.
            stage: Whose metrics are measured.
            epoch: Of the weights; None is the last one trained.
        """
        row = self.run_stage(stage, self.state.epoch if epoch is None else epoch, batches).row
        return summary_table([row])

    def predict(self, batches: Batches) -> Nested:
        """The outputs for all samples, on the host, in the form in which the task gives them.

        Ranks other than 0 get None.
        """
        parts = [map_tensors(torch.Tensor.cpu, outputs) for _, outputs in self.predictions(batches)]
        return concat(parts) if parts or rank() == 0 else None

    def predictions(self, batches: Batches) -> Iterator[tuple[Batch, Nested]]:
        """Each batch with its outputs; the watchers hear of them. Rank 0 has all ranks' shares.

        Raises:
            Stopped: In the midst of it.
        """
        epoch = self.state.epoch
        start = self.starts(PREDICT, epoch, batches)
        self.task.model.eval()
        with self.stop.deferred_until_step():
            for number, (batch, lent) in enumerate(lending(batches, epoch), start=1):
                told = self.memory.watched(PREDICT, epoch, number)
                with told, torch.no_grad(), self.task.precision.autocast():
                    outputs = self.task.predict_step(batch)
                parts = of_all_ranks((batch, outputs), lent)
                if parts:
                    made = concat(parts) if len(parts) > 1 else parts[0]
                    end = StepEnd(start.stage, epoch, count_samples(made[1]), *made)
                    self.callbacks.on_step_end(end)
                    yield made
                self.asked.after_step()
                if self.asked.by_signal:
                    break
            self.asked.settle()
        if self.asked.by_signal:
            raise TrainingInterrupted(self.asked.reason)

    def sanity_check(self, valid: Batches | None) -> None:
        """Validates a few batches, to fail before the first epoch rather than after it."""
        if valid is None or self.plan.sanity_valid_batches == 0:
            return
        rows = Rows(self.task.metrics["valid"], self.device)
        steps = self.eval_steps(valid, "valid", 0)
        for _, step, _ in islice(steps, self.plan.sanity_valid_batches):
            rows.add(step.values)
        if not rows.is_empty:
            row = rows.result("valid", 0).row
            for monitor in (self.goal, *self.keeping.monitors.values()):
                if monitor.stage == "valid":
                    goal_value(row, monitor)

    @contextmanager
    def averaged(self, train: Batches, epoch: int) -> Iterator[None]:
        """The average of the weights stands in for them, where there is one."""
        with self.averaging.applied():
            if self.averaging.average and self.averaging.measures_batches:
                self.measure_batches(train, epoch)
            yield

    @torch.no_grad()
    def measure_batches(self, train: Batches, epoch: int) -> None:
        """Finds the statistics of batch normalisation anew, where it is not frozen."""
        seed_everything(self.seed, "measured", epoch, *([rank()] if rank() else []))
        self.task.model.eval()
        with measured_anew(self.task.model) as found:
            batches = islice(lending(train, epoch), self.state.trained if found else 0)
            for batch, lent in batches:
                with self.parallel.sync_context(lent, True), self.task.precision.autocast():
                    self.task.forward_step(batch)
        self.parallel.on_epoch_end()

    @property
    def has_enough_steps(self) -> bool:
        """Whether the optimizer has made all that the plan wants."""
        return self.plan.max_steps is not None and self.learning.steps >= self.plan.max_steps

    def save_under_way(self, rows: Rows) -> None:
        """Keeps all that is needed to go on after the step just made, if that one was good."""
        self.nonfinite.look_at_all()
        rows.void(self.nonfinite.void_rows())
        if not self.nonfinite.has_diverged:
            self.keeping.under_way(rows)

    def go_on_from(self, file: Path) -> None:
        """Takes up a run that was cut, where that state was saved.

        Raises:
            UserError: It is damaged, or of another model, loss or optimizer.
        """
        self.state.take_up(file)
        for epoch in range(1, self.state.epoch + self.state.is_over) if self.state.anew else ():
            self.learning.epoch_end(value_in(self.state.history, self.goal, epoch))
        if self.state.job is not None and self.state.job.differences:
            self.nonfinite.has_diverged = False  # something is tried that may go better

    def keep_again(self, train: Batches) -> None:
        """Writes what is lost of the best weights, where training goes on from just these."""
        if not self.state.is_over or self.state.under_way:
            return
        lost = self.keeping.lost(self.state.epoch)
        if lost:
            with self.averaged(train, self.state.epoch):
                for name in lost:
                    self.keeping.save(name)

    def stand_in(self, train: Batches) -> None:
        """Says which of the best weights are lost; the last ones take the place of `best.pt`."""
        for name, epoch in self.keeping.lost().items():
            if name == BEST:
                log.warning(
                    "the best epoch was %d, but its weights are lost: the last stand in", epoch
                )
                with self.averaged(train, self.state.epoch):
                    self.state.save_best()
            else:
                log.warning("%s is lost: the weights of epoch %d are gone", name, epoch)
                self.state.remove(name)

    def reason_to_stop(self) -> str | None:
        """Why training ends before its last epoch, in words; None where it goes on."""
        if self.is_hopeless:
            return "the search takes it for hopeless"
        return stop_by(self.state.history, self.goal)

    @property
    def end(self) -> State:
        """What has become of the training, as in `status.json`."""
        if self.nonfinite.has_diverged:
            return "diverged"
        return "pruned" if self.is_hopeless else "completed"

    @property
    def goal(self) -> GoalConfig:
        """What best means."""
        return self.keeping.goal

    @property
    def learning(self) -> Learning:
        """How the weights change."""
        return self.state.learning

    def epoch_end(self, epoch: int, train: Batches, elapsed: float) -> EpochEnd:
        """What the watchers are told."""
        batches, accumulate = train.num_batches, self.learning.accumulate
        steps_per_epoch = None if batches is None else math.ceil(batches / accumulate)
        last_epoch = self.plan.epochs(steps_per_epoch)
        return EpochEnd(
            epoch=epoch,
            history=self.state.history,
            goal=self.goal,
            epochs_left=None if last_epoch is None else last_epoch - epoch,
            valid_every=self.plan.valid_every_n_epochs,
            elapsed=elapsed,
        )
