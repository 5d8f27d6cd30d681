"""The loop over the steps of a stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch.optim import Optimizer

from app.config.schema import GoalConfig, Job, MonitorConfig
from app.data.batch import BatchLoader
from app.distributed.collectives import broadcast_object, rank, world_size
from app.distributed.strategies import SingleDevice
from app.runtime.errors import UserError
from app.runtime.nested import Nested, concat, count_samples
from app.runtime.signals import StopReason, StopSignal
from app.training.accumulator import StageAccumulator, StageResult
from app.training.checkpoint.mid_epoch import (
    EpochPosition,
    PausedEpoch,
    pause,
    remaining_batches,
    restore_position,
    save_position,
)
from app.training.checkpoint.policy import CheckpointPolicy
from app.training.checkpoint.train_state import TrainState
from app.training.events import Callback, StageStart, StepEnd
from app.training.history import (
    Point,
    point_of,
)
from app.training.limits import TrainingLimits
from app.training.nonfinite import NonFinitePolicy, NonFiniteStats
from app.training.oom import OOMReporter
from app.training.optim.freezing import FreezeSchedule
from app.training.optim.optim_wrapper import OptimWrapper, OptimWrapperDict
from app.training.optim.weight_averaging import WeightAveraging
from app.training.pruning import Pruning
from app.training.rank_sync import StepBatch, StopConsensus, gather_batches, step_batches
from app.training.step_context import StepContext, seed_stage
from app.training.task import StepOutput, Task, check_step_output
from app.training.time_left import TrainingClock

TRAIN_LOSS, CPU = GoalConfig("train/loss", "min"), torch.device("cpu")
Step = tuple[StepBatch, StepOutput, dict[str, float]]  # with the learning rates by column name
PREDICT = "predict"  # stage name that callbacks receive in predictions


class StageLoop:
    """Runs the steps of one stage, records their values and calls the callbacks.

    Args:
        task: Defines the steps.
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
        optimizer: Optimizer of all that is trained, with a constant learning rate. For schedules,
            accumulation, clipping or several optimizers call `task.prepare_training` instead.

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
        optimizer: Optimizer | None = None,
    ) -> None:
        if optimizer is not None:
            task.prepare_training(OptimWrapperDict(OptimWrapper(optimizer)))
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
        self.clock: TrainingClock | None = None  # while training
        self.paused: PausedEpoch | None = None  # during a validation within an epoch

    def run_stage(
        self, stage: str, epoch: int, loader: BatchLoader, is_training: bool = False
    ) -> StageResult:
        """Run one pass over the data or train a part of an epoch; append a row to the history.

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
        if is_training:
            self.steps.prepare_epoch(loader, epoch)
        start = self.begin_stage(stage, epoch, loader)
        accumulator = StageAccumulator(
            self.task.metrics[stage],
            self.device,
            self.steps.nonfinite.pop_invalid_rows,
            self.limits.log_every_n_steps,
        )
        is_first_part = not is_training or self.state.mid_epoch is None
        if not is_first_part and self.paused is None:
            restore_position(accumulator, self.state.mid_epoch or {})
        steps = self.train_steps(loader, epoch) if is_training else self.eval_steps(loader, start)
        with self.stop.signal.deferred_until_step():
            self.record_steps(start, steps, accumulator, is_training)
        if accumulator.is_empty:
            raise UserError(f"the {stage} data has no batches")
        point = self.point(epoch) if is_training else Point(epoch, self.state.point.step)
        if self.stop.is_signal and is_training:
            self.report_interrupted(point, accumulator)
        self.stop.raise_if_signal()  # an incomplete stage is not part of the history
        result = accumulator.result(stage, point)
        is_whole_epoch = is_first_part and self.paused is None
        self.steps.nonfinite.on_stage_end(result, is_training, is_whole_epoch)
        history = [*self.state.history, result.row]
        self.callbacks.on_stage_end(result, history)
        self.state.history = history
        if is_training and self.paused is not None:
            self.state.mid_epoch = self.save_pause(self.paused)
        return result

    def record_steps(
        self,
        start: StageStart,
        steps: Iterator[Step],
        accumulator: StageAccumulator,
        is_training: bool,
    ) -> None:
        """Collect the values of all steps, call the callbacks, and save training when it is due."""
        gather = broadcast_object(self.callbacks.needs_all_ranks(start))
        for batch, output, lrs in steps:
            columns = {**output.host_values, **lrs, "data_time": batch.seconds}
            accumulator.add(output.values, columns)
            if accumulator.has_news() and rank() == 0:
                self.callbacks.on_steps_logged(accumulator.log(start.stage, start.epoch))
            self.notify_step(start, batch, output, lrs, accumulator.so_far, gather)
            if is_training and self.checkpoints.is_due():
                self.save_mid_epoch(accumulator)

    def report_interrupted(self, point: Point, accumulator: StageAccumulator) -> None:
        """Keep the position in the epoch, and report the part so far."""
        rng = self.paused.rng_state if self.paused else None
        self.state.mid_epoch = save_position(accumulator, self.state.batches_in_epoch, rng)
        result = replace(accumulator.result("train", point), is_complete=False)
        self.callbacks.on_stage_end(result, [*self.state.history, result.row])

    def save_pause(self, paused: PausedEpoch) -> EpochPosition:
        """Return the position of an epoch that continues after a validation."""
        empty = StageAccumulator(self.task.metrics["train"], self.device)
        return save_position(empty, self.state.batches_in_epoch, paused.rng_state)

    def begin_stage(self, stage: str, epoch: int, loader: BatchLoader) -> StageStart:
        """Seed the random number generators, and call the callbacks."""
        seed_stage(self.seed, stage, epoch)
        num_epochs = None if self.clock is None else self.clock.num_epochs
        point = self.point(epoch) if stage == "train" else Point(epoch, self.state.point.step)
        start = StageStart(stage, point, loader.num_batches, loader.num_samples, num_epochs)
        self.callbacks.on_stage_start(start)
        return start

    def train_steps(self, loader: BatchLoader, epoch: int) -> Iterator[Step]:
        """Train on each batch until the epoch ends, a validation is due or training must stop.

        Yields:
            Each batch, the output of its step, and the learning rates by column name.
        """
        state, optimizers = self.state, self.optimizers
        position, paused = state.mid_epoch, self.paused
        state.mid_epoch = self.paused = None
        state.batches_in_epoch = position["batches"] if position else 0
        self.steps.start_epoch(loader, epoch)
        must_end = self.must_end_epoch()
        batches = iter(()) if must_end else remaining_batches(loader, epoch, position, paused)
        if not must_end:  # a run that was stopped may be resumed just before a validation
            self.paused = self.pause_if_due(loader, batches)
        remaining = (
            self.steps.look_ahead(batches, epoch) if self.steps.needs_look_ahead else batches
        )
        for batch in () if self.paused else remaining:
            state.batches_in_epoch += 1
            state.batches += 1
            self.task.on_step_start(epoch, state.batches)
            lrs = optimizers.lrs()
            with self.steps.train_step(epoch, batch, state.batches):
                output = check_step_output(self.task, "train", self.task.train_step(batch.data))
            if norms := optimizers.grad_norms(output.num_samples):
                output = output.with_columns(norms)
            yield batch, output.as_padding() if batch.is_padding else output, lrs
            should_stop = self.stop.after_step() is not StopReason.NONE
            if self.must_end_epoch(should_stop):
                break
            self.paused = self.pause_if_due(loader, batches)
            if self.paused:
                break
        self.steps.finish_epoch(epoch)
        self.stop.finish()

    def pause_if_due(self, loader: BatchLoader, batches: Iterator[StepBatch]) -> PausedEpoch | None:
        """Pause the epoch if a validation is due before its next step; None if not."""
        every = self.limits.valid_every_n_steps
        if every is None:
            return None
        steps = self.optimizers.steps
        if steps == 0 or steps % every or not self.optimizers.at_step_boundary:
            return None
        history = self.state.history
        if any(row["stage"] == "valid" and point_of(row).step == steps for row in history):
            return None  # the epoch continues after it
        if self.state.batches_in_epoch == loader.num_batches:
            return None  # the epoch is over, and validated as a whole
        return pause(batches)

    def must_end_epoch(self, should_stop: bool = False) -> bool:
        """Return whether to end the epoch before its next step."""
        if self.steps.nonfinite.has_diverged:
            return True
        max_steps, optimizers = self.limits.max_steps, self.optimizers
        should_stop = should_stop or (max_steps is not None and optimizers.steps >= max_steps)
        return should_stop and optimizers.at_step_boundary

    def eval_steps(self, loader: BatchLoader, start: StageStart) -> Iterator[Step]:
        """Evaluate each batch, and yield it with the output, and without learning rates."""
        stage, epoch = start.stage, start.epoch
        self.task.model.eval()
        for batch in self.stop.until_signal(step_batches(loader, epoch)):
            with self.steps.eval_step(stage, epoch, batch):
                output = self.task.eval_step(stage, batch.data)
            output = check_step_output(self.task, stage, output)
            output = output.as_padding() if batch.is_padding else output
            yield batch, StepOutput(output.values, output.outputs), {}

    def notify_step(
        self,
        start: StageStart,
        batch: StepBatch,
        output: StepOutput,
        lrs: Mapping[str, float],
        so_far: Mapping[str, float],
        gather: bool,
    ) -> None:
        """Call the callbacks after a step, and pass on their request to stop.

        Args:
            start: Stage of the step.
            batch: Batch of this rank.
            output: Result of the step on this rank.
            lrs: Learning rates of the step.
            so_far: Mean loss and metrics of the stage, as far as they are known.
            gather: Whether callbacks need the batches and outputs of all ranks.
        """
        data, outputs = batch.data, output.outputs
        if gather:
            parts = gather_batches((data, outputs), batch.is_padding)
            if not parts:
                return
            data, outputs = concat(parts)
        num_samples = output.num_samples * world_size()
        self.callbacks.on_step_end(
            StepEnd(
                *(start.stage, start.epoch, num_samples, data, outputs),
                *(batch.number, so_far, lrs, self.seconds_left()),
            )
        )
        if start.stage == "train" and self.callbacks.stop_reason is not None:
            self.stop.request(StopReason.CALLBACK)

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

    def save_mid_epoch(self, accumulator: StageAccumulator) -> None:
        """Save everything needed to resume after the last step, unless training has diverged."""
        self.steps.nonfinite.sync()
        if not self.steps.nonfinite.has_diverged:
            self.checkpoints.save_mid_epoch(accumulator)

    def seconds_left(self) -> float | None:
        """Return the expected seconds until the training ends; None if they are unknown."""
        if self.clock is None:
            return None
        if self.clock.is_up_to_date():
            return self.clock.left
        state = self.state
        return self.clock.seconds_left(state.epoch, state.batches, self.optimizers.steps)

    def point(self, epoch: int) -> Point:
        """Return when the current weights are measured."""
        by_steps = self.limits.valid_every_n_steps is not None
        return Point(epoch, self.optimizers.steps if by_steps else None)

    @property
    def goal(self) -> GoalConfig:
        """Metric that decides which epoch is best."""
        return self.checkpoints.goal

    @property
    def optimizers(self) -> OptimWrapperDict:
        """Optimizer wrappers of the task."""
        return self.state.optimizers
