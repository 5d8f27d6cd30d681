"""The training loop: when to train, validate, save and stop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import count, islice
from pathlib import Path

import pandas as pd
import torch

from app.config.schema import GoalConfig, Job, MonitorConfig
from app.data.batch import BatchLoader
from app.distributed.collectives import broadcast_object, rank, world_size
from app.distributed.strategies import SingleDevice
from app.runtime.errors import UserError
from app.runtime.folders import held_folder, make_folder
from app.runtime.nested import Nested, concat, count_samples, map_tensors
from app.runtime.signals import StopReason, StopSignal, TrainingInterrupted
from app.training.accumulator import StageAccumulator, StageResult
from app.training.checkpoint.mid_epoch import remaining_batches, restore_position, save_position
from app.training.checkpoint.policy import CheckpointPolicy
from app.training.checkpoint.rotation import BEST_CHECKPOINT
from app.training.checkpoint.train_state import Phase, TrainingEnd, TrainState
from app.training.events import Callback, EpochEnd, StageStart, StepEnd
from app.training.history import (
    StatusName,
    goal_value,
    goal_value_at,
    reason_to_stop,
    summary_table,
)
from app.training.limits import TrainingLimits
from app.training.nonfinite import NonFinitePolicy
from app.training.nonfinite_event import NonFiniteStats
from app.training.oom import OOMReporter
from app.training.optim.freezing import FreezeSchedule
from app.training.optim.optim_wrapper import OptimWrapperDict
from app.training.optim.weight_averaging import WeightAveraging
from app.training.pruning import Pruning
from app.training.rank_sync import StepBatch, StopConsensus, gather_batches, step_batches
from app.training.step_context import StepContext, seed_stage
from app.training.task import StepOutput, Task, check_step_output

log = logging.getLogger(__name__)
TRAIN_LOSS, CPU = GoalConfig("train/loss", "min"), torch.device("cpu")
PREDICT = "predict"  # stage name that callbacks receive in predictions


class Trainer:
    """Trains, validates, tests and predicts with a task.

    Example::

        trainer = Trainer(task, TrainingLimits(max_epochs=10), "run")
        summary = trainer.fit(train_loader, valid_loader)
        trainer.state.load_best_weights()
        trainer.evaluate(test_loader)

    Args:
        task: Defines the steps; call its `prepare_training` first if it is trained.
        limits: How long to train, and when to validate and save.
        folder: Run folder; checkpoints are saved in its `checkpoints/`.
        goal: Metric that decides which epoch is best, and when to stop early.
        callbacks: Receives the events of the run.
        seed: Seed of all random numbers; those of a stage depend on the seed, the stage, the epoch
            and the rank only.
        device: Device that the steps run on; the task must be on it already.
        averaging: Average of the weights, used in every evaluation.
        freezing: Which parameters are frozen in which epochs.
        monitors: Further metrics whose best weights are saved, by name.
        job: Job whose configuration is saved in each checkpoint.
        strategy: How gradients are synchronized over ranks.
        stop_signal: Source of requests to stop before the limits are reached.
        pruning: Asks a hyper-parameter search whether to end the run early.
        nonfinite_stats: Receives the counts of non-finite steps.

    Attributes:
        state: Everything that is saved in a checkpoint, such as the history.
        checkpoints: Decides when to save, and which weights are the best.
        steps: What surrounds each step.
        stop: Requests to stop, on which all ranks agree.
    """

    def __init__(
        self,
        task: Task,
        limits: TrainingLimits,
        folder: str | Path,
        goal: GoalConfig = TRAIN_LOSS,
        callbacks: Callback | None = None,
        seed: int = 0,
        device: torch.device = CPU,
        averaging: WeightAveraging | None = None,
        freezing: FreezeSchedule | None = None,
        monitors: Mapping[str, MonitorConfig] | None = None,
        job: Job | None = None,
        strategy: SingleDevice | None = None,
        stop_signal: StopSignal | None = None,
        pruning: Pruning | None = None,
        nonfinite_stats: NonFiniteStats | None = None,
    ) -> None:
        self.task, self.limits, self.seed, self.device = task, limits, seed, device
        self.callbacks = callbacks or Callback()
        averaging = averaging or WeightAveraging(task.model)
        nonfinite = NonFinitePolicy(task, averaging.updates_per_step, nonfinite_stats)
        self.state = TrainState(
            task, averaging, Path(folder), job, nonfinite, self.callbacks, limits.save_schedule
        )
        self.checkpoints = CheckpointPolicy(self.state, limits.save_schedule, goal, monitors or {})
        self.steps = StepContext(
            task,
            strategy or SingleDevice(task.model),
            freezing or FreezeSchedule(task.model, {}),
            averaging,
            nonfinite,
            OOMReporter(device, job.config if job else None),
        )
        self.stop = StopConsensus(stop_signal or StopSignal())
        self.pruning = pruning or Pruning(None, goal)

    def fit(self, train: BatchLoader, valid: BatchLoader | None = None) -> pd.DataFrame:
        """Train until a limit is reached or the goal ends training early.

        The best weights are in `best.safetensors` afterwards, and everything needed to resume in
        `last.safetensors`.

        Args:
            train: Loader of the training data.
            valid: Loader of the validation data; None does not validate.

        Returns:
            Table with one row per stage and epoch.

        Raises:
            TrainingInterrupted: A signal requested to stop; `last.safetensors` has been saved.
            UserError: The folder already contains another run.
        """
        self.refuse_folder_of_other_run()
        make_folder(self.state.folder)
        with (
            held_folder(self.state.folder),
            self.stop.signal.deferred_until_step(self.limits.max_seconds),
            self.state.flushed(),
        ):
            try:
                self.resave_missing_best(train)
                self.fit_epochs(train, valid)
                self.replace_missing_best(train)
            except TrainingInterrupted:
                self.checkpoints.save_last()
                self.state.writer.wait()
                broadcast_object(None)  # no rank exits before `last.safetensors` is saved
                raise
        return summary_table(self.state.history)

    def refuse_folder_of_other_run(self) -> None:
        """Check that a training that begins overwrites no other run; all ranks must call this.

        Raises:
            UserError: The folder already contains a run that was not resumed.
        """
        state = self.state
        has_begun = state.save_count > 0 or state.batches > 0
        if broadcast_object(not has_begun and rank() == 0 and state.folder_contains_run()):
            raise UserError(
                f"folder={str(state.folder)!r} already contains a run, which is not overwritten; "
                "use another folder, or trainer.resume(CHECKPOINT) to resume the run"
            )

    def fit_epochs(self, train: BatchLoader, valid: BatchLoader | None) -> None:
        """Run the epochs that remain."""
        state, started = self.state, time.monotonic()
        if self.has_finished_training():
            log.warning("nothing to train: training ended after epoch %d", state.epoch)
            return
        self.sanity_check(valid)
        for epoch in count(state.next_epoch):
            if state.phase is Phase.TRAIN:
                self.run_stage("train", epoch, train, is_training=True)
                state.epoch, state.phase = epoch, Phase.VALID
                self.steps.averaging.on_epoch_end(epoch)
            state.end = self.limit_reached(epoch)
            with self.averaged_weights(train, epoch):
                if valid is not None and self.should_validate(epoch):
                    self.run_stage("valid", epoch, valid)
                self.checkpoints.save_best(epoch)
            self.optimizers.on_epoch_end(goal_value_at(state.history, self.goal, epoch))
            state.phase = Phase.TRAIN
            early_end = self.early_end()
            state.end = state.end or early_end
            if state.end or epoch % self.limits.save_schedule.every_n_epochs == 0:
                self.checkpoints.save_last()
            self.callbacks.on_epoch_end(self.make_epoch_end(epoch, train, started))
            if early_end is not None:
                log.info("stopped after epoch %d: %s", epoch, self.describe_early_end(early_end))
            if state.end:
                break

    def should_validate(self, epoch: int) -> bool:
        """Return whether validation is due after this epoch; it always is after the last one."""
        return self.state.end is not None or epoch % self.limits.valid_every_n_epochs == 0

    def limit_reached(self, epoch: int) -> TrainingEnd | None:
        """Return why this epoch is the last one, whatever its validation shows; None if not."""
        if self.steps.nonfinite.has_diverged:
            return TrainingEnd.DIVERGED
        if self.stop.reason is StopReason.TIME:
            return TrainingEnd.TIME
        is_last = self.limits.is_last_epoch(epoch, self.optimizers.steps)
        return TrainingEnd.LIMIT if is_last else None

    def early_end(self) -> TrainingEnd | None:
        """Return why the history ends training before its limits; None to continue."""
        is_pruned = self.pruning.should_prune(self.state.history)  # also reports to the search
        if is_pruned and self.state.end is None:
            return TrainingEnd.PRUNED
        return TrainingEnd.GOAL if self.goal_end() else None

    def goal_end(self) -> str | None:
        """Return why the goal ends training, which it does not before `min_epochs`; None if not."""
        if self.state.epoch < self.limits.min_epochs:
            return None
        return reason_to_stop(self.state.history, self.goal)

    def describe_early_end(self, end: TrainingEnd) -> str | None:
        """Return an early end as text for the log."""
        if end is TrainingEnd.PRUNED:
            return "pruned by the search"
        return self.goal_end()

    def has_finished_training(self) -> bool:
        """Return whether a resumed run has nothing left to train."""
        state = self.state
        if not state.is_between_epochs:
            return False
        if state.end in (TrainingEnd.TIME, TrainingEnd.PRUNED):
            return True
        if self.limit_reached(state.epoch) is not None:
            return True
        return state.epoch > 0 and self.goal_end() is not None

    def run_stage(
        self, stage: str, epoch: int, loader: BatchLoader, is_training: bool = False
    ) -> StageResult:
        """Run one pass over the data, and append its row to the history.

        Random numbers in it depend on the seed, the stage, the epoch and the rank only.

        Args:
            stage: `train`, `valid` or `test`.
            epoch: Epoch that is trained, or whose weights are evaluated; counted from 1.
            loader: Loader of the data.
            is_training: Whether to train; if not, the model is only evaluated.

        Raises:
            TrainingInterrupted: A signal requested to stop.
            UserError: The loader has no batches.
        """
        start = self.begin_stage(stage, epoch, loader)
        invalid_rows = self.steps.nonfinite.pop_invalid_rows
        accumulator = StageAccumulator(self.task.metrics[stage], self.device, invalid_rows)
        if is_training and self.state.mid_epoch:
            restore_position(accumulator, self.state.mid_epoch)
        gather = broadcast_object(self.callbacks.needs_all_ranks(start))
        steps = self.train_steps(loader, epoch) if is_training else self.eval_steps(loader, start)
        with self.stop.signal.deferred_until_step():
            for batch, output in steps:
                accumulator.add(output.values, output.host_values)
                self.notify_step(start, batch, output, gather)
                if is_training and self.checkpoints.is_due():
                    self.save_mid_epoch(accumulator)
        if accumulator.is_empty:
            raise UserError(f"the {stage} data has no batches")
        if self.stop.is_signal and is_training:
            self.state.mid_epoch = save_position(accumulator, self.state.batches_in_epoch)
            result = replace(accumulator.result(stage, epoch), is_complete=False)
            self.callbacks.on_stage_end(result, [*self.state.history, result.row])
        self.stop.raise_if_signal()  # an incomplete stage is not part of the history
        result = accumulator.result(stage, epoch)
        self.steps.nonfinite.on_stage_end(result, is_training)
        history = [*self.state.history, result.row]
        self.callbacks.on_stage_end(result, history)
        self.state.history = history
        return result

    def begin_stage(self, stage: str, epoch: int, loader: BatchLoader) -> StageStart:
        """Seed the random number generators, and call the callbacks."""
        seed_stage(self.seed, stage, epoch)
        start = StageStart(stage, epoch, loader.num_batches, loader.num_samples)
        self.callbacks.on_stage_start(start)
        return start

    def train_steps(
        self, loader: BatchLoader, epoch: int
    ) -> Iterator[tuple[StepBatch, StepOutput]]:
        """Train on each batch until the epoch ends or training must stop, and yield the outputs."""
        state, optimizers = self.state, self.optimizers
        position, state.mid_epoch = state.mid_epoch, None
        state.batches_in_epoch = position["batches"] if position else 0
        self.steps.start_epoch(loader, epoch)
        batches = () if self.must_end_epoch() else remaining_batches(loader, epoch, position)
        for batch in batches:
            state.batches_in_epoch += 1
            state.batches += 1
            self.task.on_step_start(epoch, state.batches)
            lrs = optimizers.lrs()
            with self.steps.train_step(epoch, batch, state.batches):
                output = check_step_output(self.task, "train", self.task.train_step(batch.data))
            output = output.with_columns(optimizers.grad_norms(output.num_samples), lrs)
            yield batch, output.as_padding() if batch.is_padding else output
            should_stop = self.stop.after_step() is not StopReason.NONE
            if self.must_end_epoch(should_stop):
                break
        self.steps.finish_epoch(epoch)
        self.stop.finish()

    def must_end_epoch(self, should_stop: bool = False) -> bool:
        """Return whether to end the epoch before its next step."""
        if self.steps.nonfinite.has_diverged:
            return True
        max_steps, optimizers = self.limits.max_steps, self.optimizers
        should_stop = should_stop or (max_steps is not None and optimizers.steps >= max_steps)
        return should_stop and optimizers.at_step_boundary

    def eval_steps(
        self, loader: BatchLoader, start: StageStart
    ) -> Iterator[tuple[StepBatch, StepOutput]]:
        """Evaluate each batch, and yield the outputs."""
        stage, epoch = start.stage, start.epoch
        self.task.model.eval()
        for batch in self.stop.until_signal(step_batches(loader, epoch)):
            with self.steps.eval_step(stage, epoch, batch):
                output = self.task.eval_step(stage, batch.data)
            output = check_step_output(self.task, stage, output)
            output = output.as_padding() if batch.is_padding else output
            yield batch, StepOutput(output.values, output.outputs)

    def notify_step(
        self, start: StageStart, batch: StepBatch, output: StepOutput, gather: bool
    ) -> None:
        """Call the callbacks after a step.

        Args:
            start: Stage of the step.
            batch: Batch of this rank.
            output: Result of the step on this rank.
            gather: Whether callbacks need the batches and outputs of all ranks.
        """
        data, outputs = batch.data, output.outputs
        if gather:
            parts = gather_batches((data, outputs), batch.is_padding)
            if not parts:
                return
            data, outputs = concat(parts)
        num_samples = output.num_samples * world_size()
        self.callbacks.on_step_end(StepEnd(start.stage, start.epoch, num_samples, data, outputs))

    def evaluate(
        self, loader: BatchLoader, stage: str = "test", epoch: int | None = None
    ) -> pd.DataFrame:
        """Evaluate the current weights.

        Args:
            loader: Loader of the data.
            stage: `valid` or `test`, whose metrics are used.
            epoch: Epoch of the weights; None is the last one trained.

        Returns:
            Table with one row.

        Raises:
            TrainingInterrupted: A signal requested to stop.
        """
        row = self.run_stage(stage, self.state.epoch if epoch is None else epoch, loader).row
        return summary_table([row])

    def predict(self, loader: BatchLoader) -> Nested:
        """Return the outputs for all samples, on the host.

        They have the structure that `Task.predict_step` returns. Ranks other than 0 get None.

        Raises:
            TrainingInterrupted: A signal requested to stop.
        """
        parts = [map_tensors(torch.Tensor.cpu, outputs) for _, outputs in self.predictions(loader)]
        return concat(parts) if parts or rank() == 0 else None

    def predictions(self, loader: BatchLoader) -> Iterator[tuple[Nested, Nested]]:
        """Yield each batch with its outputs; rank 0 gets those of all ranks, the others nothing.

        Raises:
            TrainingInterrupted: A signal requested to stop.
        """
        epoch = self.state.epoch
        self.begin_stage(PREDICT, epoch, loader)
        self.task.model.eval()
        with self.stop.signal.deferred_until_step():
            for batch in self.stop.until_signal(step_batches(loader, epoch)):
                with self.steps.eval_step(PREDICT, epoch, batch):
                    outputs = self.task.predict_step(batch.data)
                parts = gather_batches((batch.data, outputs), batch.is_padding)
                if parts:
                    data, outputs = concat(parts) if len(parts) > 1 else parts[0]
                    num_samples = count_samples(outputs)
                    step_end = StepEnd(PREDICT, epoch, num_samples, data, outputs)
                    self.callbacks.on_step_end(step_end)
                    yield data, outputs
        self.stop.raise_if_signal()

    def sanity_check(self, valid: BatchLoader | None) -> None:
        """Validate a few batches, so that errors show before the first epoch, not after it."""
        if valid is None or self.limits.sanity_valid_batches == 0:
            return
        accumulator = StageAccumulator(self.task.metrics["valid"], self.device)
        start = StageStart("valid", 0, valid.num_batches, valid.num_samples)
        for _, output in islice(self.eval_steps(valid, start), self.limits.sanity_valid_batches):
            accumulator.add(output.values)
        if not accumulator.is_empty:
            row = accumulator.result("valid", 0).row
            for monitor in (self.goal, *self.checkpoints.monitors.values()):
                if monitor.stage == "valid":
                    goal_value(row, monitor)

    def averaged_weights(self, train: BatchLoader, epoch: int) -> AbstractContextManager[None]:
        """Use the averaged weights inside the `with` block, if there are any."""
        num_batches = self.state.batches_in_epoch
        return self.steps.averaged_weights(train, epoch, num_batches, self.seed)

    def save_mid_epoch(self, accumulator: StageAccumulator) -> None:
        """Save everything needed to resume after the last step, unless training has diverged."""
        self.steps.nonfinite.sync()
        if not self.steps.nonfinite.has_diverged:
            self.checkpoints.save_mid_epoch(accumulator)

    def resume(self, file: Path) -> None:
        """Restore everything from a checkpoint, to resume where it was saved.

        Args:
            file: A `last*.safetensors`.

        Raises:
            UserError: The file is damaged, or of another model, loss or optimizer.
        """
        state = self.state
        if state.load(file):  # replay the epochs for the new schedule
            for epoch in range(1, state.next_epoch):
                self.optimizers.on_epoch_end(goal_value_at(state.history, self.goal, epoch))
        if state.job is not None and state.job.differences:
            self.steps.nonfinite.has_diverged = False  # other settings may not diverge

    def resave_missing_best(self, train: BatchLoader) -> None:
        """Save missing or damaged best checkpoints again that the current weights belong in."""
        if not self.state.is_between_epochs:
            return
        missing = self.checkpoints.missing(self.state.epoch)
        if missing:
            with self.averaged_weights(train, self.state.epoch):
                for name in missing:
                    self.checkpoints.save(name)

    def replace_missing_best(self, train: BatchLoader) -> None:
        """Warn of missing best checkpoints; `best.safetensors` gets the last weights instead."""
        for name, epoch in self.checkpoints.missing().items():
            if name == BEST_CHECKPOINT:
                log.warning(
                    "%s: the weights of the best epoch %d are lost (the file is missing, damaged "
                    "or of another epoch); saving the weights of the last epoch %d instead",
                    name,
                    epoch,
                    self.state.epoch,
                )
                with self.averaged_weights(train, self.state.epoch):
                    self.state.save_best()
            else:
                log.warning(
                    "%s: the weights of epoch %d are lost (the file is missing, damaged or of "
                    "another epoch)",
                    name,
                    epoch,
                )
                self.state.remove_checkpoint(name)

    @property
    def outcome(self) -> StatusName:
        """How training ended, as in `status.json`."""
        if self.steps.nonfinite.has_diverged:
            return "diverged"
        return "pruned" if self.state.end is TrainingEnd.PRUNED else "completed"

    @property
    def goal(self) -> GoalConfig:
        """Metric that decides which epoch is best."""
        return self.checkpoints.goal

    @property
    def optimizers(self) -> OptimWrapperDict:
        """Optimizer wrappers of the task."""
        return self.state.optimizers

    def make_epoch_end(self, epoch: int, train: BatchLoader, started: float) -> EpochEnd:
        """Return what callbacks receive after an epoch."""
        batches, accumulate = train.num_batches, self.optimizers.accumulate
        steps_per_epoch = None if batches is None else math.ceil(batches / accumulate)
        last_epoch = self.limits.num_epochs(steps_per_epoch)
        return EpochEnd(
            epoch=epoch,
            history=self.state.history,
            goal=self.goal,
            epochs_left=None if last_epoch is None else last_epoch - epoch,
            valid_every=self.limits.valid_every_n_epochs,
            elapsed=time.monotonic() - started,
        )
