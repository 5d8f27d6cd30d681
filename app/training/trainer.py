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
from app.data.batch import Batch, BatchLoader
from app.distributed.collectives import broadcast_object, rank, world_size
from app.distributed.strategies import SingleDevice
from app.runtime.errors import UserError
from app.runtime.nested import Nested, concat, count_samples, map_tensors
from app.runtime.seed import seed_everything
from app.runtime.signals import StopSignal, TrainingInterrupted
from app.training.accumulator import StageAccumulator, StageResult, zeros_like_row
from app.training.checkpoint.checkpoint import BEST
from app.training.checkpoint.mid_epoch import remaining_batches, restore_position, save_position
from app.training.checkpoint.policy import CheckpointPolicy
from app.training.checkpoint.train_state import TrainState
from app.training.events import Callback, EpochEnd, StageStart, StepEnd
from app.training.history import StatusName, goal_value, goal_value_at, summary_table
from app.training.history import reason_to_stop as stop_by
from app.training.nonfinite import NonFinitePolicy
from app.training.oom import OOMReporter
from app.training.optim.freezing import FreezeSchedule
from app.training.optim.optim_wrapper import OptimWrapperDict
from app.training.optim.weight_averaging import WeightAveraging, recompute_bn_stats
from app.training.plan import TrainingLimits
from app.training.pruning import Pruning
from app.training.rank_sync import StopConsensus, gather_batches, padded_batches
from app.training.task import StepOutput, Task, check_step_output

log = logging.getLogger(__name__)
StepResult = tuple[Batch, StepOutput, dict[str, float]]  # a batch, its step, further columns
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
        limits: TrainingLimits,
        folder: Path,
        goal: GoalConfig = TRAIN_LOSS,
        callbacks: Callback | None = None,
        seed: int = 0,
        device: torch.device = CPU,
        averaging: WeightAveraging | None = None,
        freezing: FreezeSchedule | None = None,
        monitors: Mapping[str, MonitorConfig] | None = None,
        job: Job | None = None,
        strategy: SingleDevice | None = None,
        stop: StopSignal | None = None,
        pruning: Pruning | None = None,
    ) -> None:
        self.task, self.limits = task, limits
        self.callbacks, self.seed, self.device = callbacks or Callback(), seed, device
        self.averaging = averaging or WeightAveraging(task.model)
        self.freezing = freezing or FreezeSchedule(task.model, {})
        self.state = TrainState(
            task, self.averaging, folder, job, self.callbacks, limits.save_schedule
        )
        self.checkpoints = CheckpointPolicy(self.state, limits.save_schedule, goal, monitors or {})
        self.strategy, self.stop = strategy or SingleDevice(task.model), stop or StopSignal()
        self.stop_consensus = StopConsensus(self.stop)
        self.pruning, self.is_pruned = pruning or Pruning(None, goal), False
        self.nonfinite = NonFinitePolicy(task, waits=self.averaging.updates_per_step)
        self.state.nonfinite = self.nonfinite
        self.oom = OOMReporter(device, job.config if job else None)

    def fit(self, train: BatchLoader, valid: BatchLoader | None = None) -> pd.DataFrame:
        """Trains to the end of the plan, or until the goal stops it.

        Leaves `best.pt` and `last.pt`, and gives the summary: a line for each stage.

        Raises:
            Stopped: It was asked to end before its time; `last.pt` has what there is.
        """
        with self.stop.deferred_until_step(self.limits.max_seconds), self.state.flushed():
            try:
                self.resave_missing_best(train)
                summary = self.fit_epochs(train, valid)
                self.replace_missing_best(train)
            except TrainingInterrupted:
                self.checkpoints.save_last()
                self.state.writer.wait()
                broadcast_object(None)  # no rank leaves before it is saved
                raise
        return summary

    def fit_epochs(self, train: BatchLoader, valid: BatchLoader | None) -> pd.DataFrame:
        """Epoch after epoch."""
        began = time.monotonic()
        if self.is_finished():
            log.warning("nothing to train: the plan was over after epoch %d", self.state.epoch)
            return summary_table(self.state.history)
        self.sanity_check(valid)
        for epoch in count(self.state.epoch + self.state.epoch_finished):
            if self.state.epoch_finished:
                self.run_stage("train", epoch, train, learns=True)
                self.state.epoch, self.state.epoch_finished = epoch, False
                self.averaging.after_epoch(epoch)
            self.state.time_is_up = bool(self.stop_consensus.reason)
            last = self.limits.is_last_epoch(epoch, self.optimizers.steps) or self.state.time_is_up
            last = last or self.nonfinite.has_diverged

            with self.averaged_weights(train, epoch):
                if valid is not None and (last or epoch % self.limits.valid_every_n_epochs == 0):
                    self.run_stage("valid", epoch, valid)
                self.checkpoints.save_best(epoch)
            self.optimizers.epoch_end(goal_value_at(self.state.history, self.goal, epoch))
            self.state.epoch_finished = True
            self.is_pruned = self.pruning.should_prune(self.state.history) and not last
            reason = self.reason_to_stop()
            if last or reason or epoch % self.limits.save_schedule.every_n_epochs == 0:
                self.checkpoints.save_last()

            self.callbacks.on_epoch_end(self.make_epoch_end(epoch, train, time.monotonic() - began))
            if reason:
                log.info("stopped after epoch %d: %s", epoch, reason)
            if last or reason:
                break
        return summary_table(self.state.history)

    def is_finished(self) -> bool:
        """Whether training has come to its end already, in a run that goes on."""
        epoch, ended = self.state.epoch, self.state.epoch_finished and self.state.mid_epoch is None
        by_plan = self.limits.is_last_epoch(epoch, self.optimizers.steps) or self.state.time_is_up
        by_plan = by_plan or self.nonfinite.has_diverged
        return ended and (by_plan or (epoch > 0 and self.reason_to_stop() is not None))

    def run_stage(
        self, stage: str, epoch: int, batches: BatchLoader, learns: bool = False
    ) -> StageResult:
        """One pass over the batches; its row joins the history, the watchers hear of it.

        What is drawn in it depends on the seed, the stage, the epoch and the rank alone.

        Raises:
            Stopped: In the midst of it.
        """
        start = self.begin_stage(stage, epoch, batches)
        rows = StageAccumulator(self.task.metrics[stage], self.device)
        if learns and self.state.mid_epoch:
            restore_position(rows, self.state.mid_epoch)
        whole = broadcast_object(self.callbacks.needs_all_ranks(start))
        run = self.train_steps if learns else self.eval_steps
        with self.stop.deferred_until_step():
            for batch, step, numbers in run(batches, stage, epoch):
                rows.add(step.values, numbers)
                rows.mask_last(self.nonfinite.num_invalid_rows())
                self.notify_step(start, batch, step, whole)
                if learns and self.checkpoints.is_due():
                    self.save_mid_epoch(rows)
        rows.mask_last(self.nonfinite.num_invalid_rows())
        if rows.is_empty:
            raise UserError(f"the {stage} data gives no batch")
        if self.stop_consensus.is_signal and not learns:
            raise TrainingInterrupted(self.stop_consensus.reason)
        if self.stop_consensus.is_signal:
            self.state.mid_epoch = save_position(rows, self.state.batches_in_epoch)
        result = rows.result(stage, epoch)
        if not learns:
            self.nonfinite.check_eval(result)
        history = [*self.state.history, result.row]
        result = replace(result, is_whole=not self.stop_consensus.is_signal)
        self.callbacks.on_stage_end(result, history)
        if self.stop_consensus.is_signal:
            raise TrainingInterrupted(
                self.stop_consensus.reason
            )  # the stage is not over, and not part of the history
        self.state.history = history
        return result

    def begin_stage(self, stage: str, epoch: int, batches: BatchLoader) -> StageStart:
        """A stage begins: seeds, and the watchers hear of it."""
        seed_everything(self.seed, stage, epoch, *([rank()] if rank() else []))
        start = StageStart(stage, epoch, batches.num_batches, batches.num_samples)
        self.callbacks.on_stage_start(start)
        return start

    def train_steps(self, batches: BatchLoader, stage: str, epoch: int) -> Iterator[StepResult]:
        """Learns from each batch, until there are enough steps."""
        task, learning = self.task, self.optimizers
        task.model.train()
        self.freezing.apply(epoch)
        self.strategy.on_epoch_start()
        before, self.state.mid_epoch = self.state.mid_epoch, None
        self.state.batches_in_epoch = before["batches"] if before else 0
        self.nonfinite.on_epoch_start(batches, epoch, before is not None)
        is_over = self.has_reached_max_steps or self.nonfinite.has_diverged
        for batch, lent in remaining_batches(batches, epoch, before) if not is_over else ():
            self.state.batches_in_epoch += 1
            self.state.batches += 1
            task.on_step_start(epoch, self.state.batches)
            rates = learning.lrs()
            self.nonfinite.on_batch_start(
                batch, lent, self.state.batches_in_epoch, self.state.batches
            )
            with (
                self.oom.guard_step(stage, epoch, self.state.batches_in_epoch),
                self.step_context(stage, lent),
                self.strategy.sync_context(lent, learning.steps_next),
            ):
                step = check_step_output(task, stage, task.train_step(batch))
            self.nonfinite.on_batch_end()
            self.averaging.update(epoch, learning.steps)
            row = {**step.values, **learning.grad_norms(step.num_samples)}
            values = zeros_like_row(row) if lent else row
            yield batch, StepOutput(values, step.outputs), {**step.host_values, **rates}
            asked = self.stop_consensus.after_step()
            if self.nonfinite.has_diverged:
                break
            if (asked or self.has_reached_max_steps) and learning.at_step_boundary:
                break
        learning.flush()
        self.stop_consensus.finish()
        self.nonfinite.on_epoch_end(is_whole=not self.stop_consensus.is_signal)
        self.averaging.update(epoch, learning.steps)
        self.strategy.on_epoch_end()

    def eval_steps(self, batches: BatchLoader, stage: str, epoch: int) -> Iterator[StepResult]:
        """Measures each batch."""
        self.task.model.eval()
        for number, (batch, lent) in enumerate(padded_batches(batches, epoch), start=1):
            told = self.oom.guard_step(stage, epoch, number)
            with told, torch.no_grad(), self.step_context(stage, lent):
                step = check_step_output(self.task, stage, self.task.eval_step(stage, batch))
            yield batch, StepOutput(zeros_like_row(step.values), step.outputs) if lent else step, {}
            self.stop_consensus.after_step()
            if self.stop_consensus.is_signal:
                break
        self.stop_consensus.finish()

    @contextmanager
    def step_context(self, stage: str, lent: bool) -> Iterator[None]:
        """In the precision of the forward pass; a lent batch counts nothing."""
        muted = self.task.metrics[stage].paused() if lent else nullcontext()
        with muted, self.task.precision.autocast():
            yield

    def notify_step(self, start: StageStart, batch: Batch, step: StepOutput, whole: bool) -> None:
        """The watchers hear of a step; where they want so, of all ranks' parts of it."""
        parts = gather_batches((batch, step.outputs), not step.num_samples) if whole else []
        if parts or not whole:
            told = concat(parts) if parts else (batch, step.outputs)
            count = step.num_samples * world_size()
            self.callbacks.on_step_end(StepEnd(start.stage, start.epoch, count, *told))

    def evaluate(
        self, batches: BatchLoader, stage: str = "test", epoch: int | None = None
    ) -> pd.DataFrame:
        """Measures the weights as they are; gives the stage's line of the summary.

        Args:
            batches: Gone through once.
            stage: Whose metrics are measured.
            epoch: Of the weights; None is the last one trained.
        """
        row = self.run_stage(stage, self.state.epoch if epoch is None else epoch, batches).row
        return summary_table([row])

    def predict(self, batches: BatchLoader) -> Nested:
        """The outputs for all samples, on the host, in the form in which the task gives them.

        Ranks other than 0 get None.
        """
        parts = [map_tensors(torch.Tensor.cpu, outputs) for _, outputs in self.predictions(batches)]
        return concat(parts) if parts or rank() == 0 else None

    def predictions(self, batches: BatchLoader) -> Iterator[tuple[Batch, Nested]]:
        """Each batch with its outputs; the watchers hear of them. Rank 0 has all ranks' shares.

        Raises:
            Stopped: In the midst of it.
        """
        epoch = self.state.epoch
        start = self.begin_stage(PREDICT, epoch, batches)
        self.task.model.eval()
        with self.stop.deferred_until_step():
            for number, (batch, lent) in enumerate(padded_batches(batches, epoch), start=1):
                told = self.oom.guard_step(PREDICT, epoch, number)
                with told, torch.no_grad(), self.task.precision.autocast():
                    outputs = self.task.predict_step(batch)
                parts = gather_batches((batch, outputs), lent)
                if parts:
                    made = concat(parts) if len(parts) > 1 else parts[0]
                    end = StepEnd(start.stage, epoch, count_samples(made[1]), *made)
                    self.callbacks.on_step_end(end)
                    yield made
                self.stop_consensus.after_step()
                if self.stop_consensus.is_signal:
                    break
            self.stop_consensus.finish()
        if self.stop_consensus.is_signal:
            raise TrainingInterrupted(self.stop_consensus.reason)

    def sanity_check(self, valid: BatchLoader | None) -> None:
        """Validates a few batches, to fail before the first epoch rather than after it."""
        if valid is None or self.limits.sanity_valid_batches == 0:
            return
        rows = StageAccumulator(self.task.metrics["valid"], self.device)
        steps = self.eval_steps(valid, "valid", 0)
        for _, step, _ in islice(steps, self.limits.sanity_valid_batches):
            rows.add(step.values)
        if not rows.is_empty:
            row = rows.result("valid", 0).row
            for monitor in (self.goal, *self.checkpoints.monitors.values()):
                if monitor.stage == "valid":
                    goal_value(row, monitor)

    @contextmanager
    def averaged_weights(self, train: BatchLoader, epoch: int) -> Iterator[None]:
        """The average of the weights stands in for them, where there is one."""
        with self.averaging.swapped_in():
            if self.averaging.average and self.averaging.needs_bn_update:
                self.update_bn(train, epoch)
            yield

    @torch.no_grad()
    def update_bn(self, train: BatchLoader, epoch: int) -> None:
        """Finds the statistics of batch normalisation anew, where it is not frozen."""
        seed_everything(self.seed, "measured", epoch, *([rank()] if rank() else []))
        self.task.model.eval()
        with recompute_bn_stats(self.task.model) as found:
            batches = islice(
                padded_batches(train, epoch), self.state.batches_in_epoch if found else 0
            )
            for batch, lent in batches:
                with self.strategy.sync_context(lent, True), self.task.precision.autocast():
                    self.task.bn_forward(batch)
        self.strategy.on_epoch_end()

    @property
    def has_reached_max_steps(self) -> bool:
        """Whether the optimizer has made all that the plan wants."""
        return self.limits.max_steps is not None and self.optimizers.steps >= self.limits.max_steps

    def save_mid_epoch(self, rows: StageAccumulator) -> None:
        """Keeps all that is needed to go on after the step just made, if that one was good."""
        self.nonfinite.sync()
        rows.mask_last(self.nonfinite.num_invalid_rows())
        if not self.nonfinite.has_diverged:
            self.checkpoints.save_mid_epoch(rows)

    def resume(self, file: Path) -> None:
        """Takes up a run that was cut, where that state was saved.

        Raises:
            UserError: It is damaged, or of another model, loss or optimizer.
        """
        self.state.load(file)
        for epoch in (
            range(1, self.state.epoch + self.state.epoch_finished)
            if self.state.schedule_changed
            else ()
        ):
            self.optimizers.epoch_end(goal_value_at(self.state.history, self.goal, epoch))
        if self.state.job is not None and self.state.job.differences:
            self.nonfinite.has_diverged = False  # something is tried that may go better

    def resave_missing_best(self, train: BatchLoader) -> None:
        """Writes what is lost of the best weights, where training goes on from just these."""
        if not self.state.epoch_finished or self.state.mid_epoch:
            return
        lost = self.checkpoints.missing(self.state.epoch)
        if lost:
            with self.averaged_weights(train, self.state.epoch):
                for name in lost:
                    self.checkpoints.save(name)

    def replace_missing_best(self, train: BatchLoader) -> None:
        """Says which of the best weights are lost; the last ones take the place of `best.pt`."""
        for name, epoch in self.checkpoints.missing().items():
            if name == BEST:
                log.warning(
                    "the best epoch was %d, but its weights are lost: the last stand in", epoch
                )
                with self.averaged_weights(train, self.state.epoch):
                    self.state.save_best()
            else:
                log.warning("%s is lost: the weights of epoch %d are gone", name, epoch)
                self.state.remove(name)

    def reason_to_stop(self) -> str | None:
        """Why training ends before its last epoch, in words; None where it goes on."""
        if self.is_pruned:
            return "the search takes it for hopeless"
        return stop_by(self.state.history, self.goal)

    @property
    def outcome(self) -> StatusName:
        """What has become of the training, as in `status.json`."""
        if self.nonfinite.has_diverged:
            return "diverged"
        return "pruned" if self.is_pruned else "completed"

    @property
    def goal(self) -> GoalConfig:
        """What best means."""
        return self.checkpoints.goal

    @property
    def optimizers(self) -> OptimWrapperDict:
        """How the weights change."""
        return self.state.optimizers

    def make_epoch_end(self, epoch: int, train: BatchLoader, elapsed: float) -> EpochEnd:
        """What the watchers are told."""
        batches, accumulate = train.num_batches, self.optimizers.accumulate
        steps_per_epoch = None if batches is None else math.ceil(batches / accumulate)
        last_epoch = self.limits.num_epochs(steps_per_epoch)
        return EpochEnd(
            epoch=epoch,
            history=self.state.history,
            goal=self.goal,
            epochs_left=None if last_epoch is None else last_epoch - epoch,
            valid_every=self.limits.valid_every_n_epochs,
            elapsed=elapsed,
        )
