"""The training loop: when to train, validate, save and stop."""

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
from app.training.checkpoint.checkpoint import BEST_CHECKPOINT
from app.training.checkpoint.mid_epoch import remaining_batches, restore_position, save_position
from app.training.checkpoint.policy import CheckpointPolicy
from app.training.checkpoint.train_state import TrainState
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
from app.training.oom import OOMReporter
from app.training.optim.freezing import FreezeSchedule
from app.training.optim.optim_wrapper import OptimWrapperDict
from app.training.optim.weight_averaging import WeightAveraging, recompute_bn_stats
from app.training.pruning import Pruning
from app.training.rank_sync import StopConsensus, gather_batches, padded_batches
from app.training.task import StepOutput, Task, check_step_output

log = logging.getLogger(__name__)
BatchResult = tuple[Batch, StepOutput, dict[str, float]]  # with the host values of the step
TRAIN_LOSS, CPU = GoalConfig("train/loss", "min"), torch.device("cpu")
PREDICT = "predict"  # stage name that callbacks receive in predictions


class Trainer:
    """Trains, validates, tests and predicts with a task.

    Example::

        trainer = Trainer(task, TrainingLimits(max_epochs=10), Path("run"))
        summary = trainer.fit(train_loader, valid_loader)
        trainer.state.load_best_weights()
        trainer.evaluate(test_loader)

    Args:
        task: Defines the steps; its `optimizers` must be set if it is trained.
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

    Attributes:
        state: Everything that is saved in a checkpoint, such as the history.
        checkpoints: Decides when to save, and which weights are the best.
        is_pruned: Whether a search has ended the run.
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
        stop_signal: StopSignal | None = None,
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
        self.strategy = strategy or SingleDevice(task.model)
        self.stop_signal = stop_signal or StopSignal()
        self.stop_consensus = StopConsensus(self.stop_signal)
        self.pruning, self.is_pruned = pruning or Pruning(None, goal), False
        self.nonfinite = NonFinitePolicy(task, syncs_every_step=self.averaging.updates_per_step)
        self.state.nonfinite = self.nonfinite
        self.oom = OOMReporter(device, job.config if job else None)

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
            TrainingInterrupted: If a signal requested to stop; `last.safetensors` has been saved.
        """
        with self.stop_signal.deferred_until_step(self.limits.max_seconds), self.state.flushed():
            try:
                self.resave_missing_best(train)
                summary = self.fit_epochs(train, valid)
                self.replace_missing_best(train)
            except TrainingInterrupted:
                self.checkpoints.save_last()
                self.state.writer.wait()
                broadcast_object(None)  # no rank exits before `last.safetensors` is saved
                raise
        return summary

    def fit_epochs(self, train: BatchLoader, valid: BatchLoader | None) -> pd.DataFrame:
        """Run the epochs that remain, and return the summary table."""
        started = time.monotonic()
        if self.has_finished_training():
            log.warning("nothing to train: training ended after epoch %d", self.state.epoch)
            return summary_table(self.state.history)
        self.sanity_check(valid)
        for epoch in count(self.state.epoch + self.state.epoch_finished):
            if self.state.epoch_finished:
                self.run_stage("train", epoch, train, is_training=True)
                self.state.epoch, self.state.epoch_finished = epoch, False
                self.averaging.on_epoch_end(epoch)
            self.state.time_is_up = bool(self.stop_consensus.reason)
            is_last = self.limits.is_last_epoch(epoch, self.optimizers.steps)
            is_last = is_last or self.state.time_is_up or self.nonfinite.has_diverged

            with self.averaged_weights(train, epoch):
                is_due = is_last or epoch % self.limits.valid_every_n_epochs == 0
                if valid is not None and is_due:
                    self.run_stage("valid", epoch, valid)
                self.checkpoints.save_best(epoch)
            self.optimizers.on_epoch_end(goal_value_at(self.state.history, self.goal, epoch))
            self.state.epoch_finished = True
            self.is_pruned = self.pruning.should_prune(self.state.history) and not is_last
            reason = self.stop_reason()
            if is_last or reason or epoch % self.limits.save_schedule.every_n_epochs == 0:
                self.checkpoints.save_last()

            elapsed = time.monotonic() - started
            self.callbacks.on_epoch_end(self.make_epoch_end(epoch, train, elapsed))
            if reason:
                log.info("stopped after epoch %d: %s", epoch, reason)
            if is_last or reason:
                break
        return summary_table(self.state.history)

    def has_finished_training(self) -> bool:
        """Return whether a resumed run has nothing left to train."""
        if not self.state.epoch_finished or self.state.mid_epoch is not None:
            return False
        epoch = self.state.epoch
        if self.limits.is_last_epoch(epoch, self.optimizers.steps) or self.state.time_is_up:
            return True
        return self.nonfinite.has_diverged or (epoch > 0 and self.stop_reason() is not None)

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
            TrainingInterrupted: If a signal requested to stop.
            UserError: If the loader has no batches.
        """
        start = self.begin_stage(stage, epoch, loader)
        accumulator = StageAccumulator(self.task.metrics[stage], self.device)
        if is_training and self.state.mid_epoch:
            restore_position(accumulator, self.state.mid_epoch)
        gather = broadcast_object(self.callbacks.needs_all_ranks(start))
        run_steps = self.train_steps if is_training else self.eval_steps
        with self.stop_signal.deferred_until_step():
            for batch, output, host_values in run_steps(loader, stage, epoch):
                accumulator.add(output.values, host_values)
                accumulator.mask_last(self.nonfinite.pop_invalid_rows())
                self.notify_step(start, batch, output, gather)
                if is_training and self.checkpoints.is_due():
                    self.save_mid_epoch(accumulator)
        accumulator.mask_last(self.nonfinite.pop_invalid_rows())
        if accumulator.is_empty:
            raise UserError(f"the {stage} data has no batches")
        if self.stop_consensus.is_signal and not is_training:
            raise TrainingInterrupted(self.stop_consensus.reason)
        if self.stop_consensus.is_signal:
            self.state.mid_epoch = save_position(accumulator, self.state.batches_in_epoch)
        result = accumulator.result(stage, epoch)
        if not is_training:
            self.nonfinite.check_eval(result)
        history = [*self.state.history, result.row]
        result = replace(result, is_complete=not self.stop_consensus.is_signal)
        self.callbacks.on_stage_end(result, history)
        if self.stop_consensus.is_signal:  # an incomplete stage is not part of the history
            raise TrainingInterrupted(self.stop_consensus.reason)
        self.state.history = history
        return result

    def begin_stage(self, stage: str, epoch: int, loader: BatchLoader) -> StageStart:
        """Seed the random number generators, and call the callbacks."""
        seed_everything(self.seed, stage, epoch, *([rank()] if rank() else []))
        start = StageStart(stage, epoch, loader.num_batches, loader.num_samples)
        self.callbacks.on_stage_start(start)
        return start

    def train_steps(self, loader: BatchLoader, stage: str, epoch: int) -> Iterator[BatchResult]:
        """Train on each batch until the epoch ends or training must stop, and yield the results."""
        task, optimizers = self.task, self.optimizers
        task.model.train()
        self.freezing.apply(epoch)
        self.strategy.on_epoch_start()
        position, self.state.mid_epoch = self.state.mid_epoch, None
        self.state.batches_in_epoch = position["batches"] if position else 0
        self.nonfinite.on_epoch_start(loader, epoch, position is not None)
        is_over = self.has_reached_max_steps or self.nonfinite.has_diverged
        batches = remaining_batches(loader, epoch, position) if not is_over else ()
        for batch, is_padding in batches:
            self.state.batches_in_epoch += 1
            self.state.batches += 1
            task.on_step_start(epoch, self.state.batches)
            lrs = optimizers.lrs()
            self.nonfinite.on_batch_start(
                batch, is_padding, self.state.batches_in_epoch, self.state.batches
            )
            with (
                self.oom.guard_step(stage, epoch, self.state.batches_in_epoch),
                self.step_context(stage, is_padding),
                self.strategy.sync_context(is_padding, optimizers.steps_next),
            ):
                output = check_step_output(task, stage, task.train_step(batch))
            self.nonfinite.on_batch_end()
            self.averaging.update(epoch, optimizers.steps)
            row = {**output.values, **optimizers.grad_norms(output.num_samples)}
            values = zeros_like_row(row) if is_padding else row
            yield batch, StepOutput(values, output.outputs), {**output.host_values, **lrs}
            should_stop = self.stop_consensus.after_step()
            if self.nonfinite.has_diverged:
                break
            if (should_stop or self.has_reached_max_steps) and optimizers.at_step_boundary:
                break
        optimizers.flush()
        self.stop_consensus.finish()
        self.nonfinite.on_epoch_end(is_complete=not self.stop_consensus.is_signal)
        self.averaging.update(epoch, optimizers.steps)
        self.strategy.on_epoch_end()

    def eval_steps(self, loader: BatchLoader, stage: str, epoch: int) -> Iterator[BatchResult]:
        """Evaluate each batch, and yield the results."""
        self.task.model.eval()
        for number, (batch, is_padding) in enumerate(padded_batches(loader, epoch), start=1):
            guard = self.oom.guard_step(stage, epoch, number)
            with guard, torch.no_grad(), self.step_context(stage, is_padding):
                output = check_step_output(self.task, stage, self.task.eval_step(stage, batch))
            if is_padding:
                output = StepOutput(zeros_like_row(output.values), output.outputs)
            yield batch, output, {}
            self.stop_consensus.after_step()
            if self.stop_consensus.is_signal:
                break
        self.stop_consensus.finish()

    @contextmanager
    def step_context(self, stage: str, is_padding: bool) -> Iterator[None]:
        """Autocast the forward pass, and leave padding batches out of the metrics."""
        maybe_paused = self.task.metrics[stage].paused() if is_padding else nullcontext()
        with maybe_paused, self.task.precision.autocast():
            yield

    def notify_step(
        self, start: StageStart, batch: Batch, output: StepOutput, gather: bool
    ) -> None:
        """Call the callbacks after a step.

        Args:
            start: Stage of the step.
            batch: Batch of this rank.
            output: Result of the step on this rank.
            gather: Whether callbacks need the batches and outputs of all ranks.
        """
        parts = gather_batches((batch, output.outputs), not output.num_samples) if gather else []
        if parts or not gather:
            batch, outputs = concat(parts) if parts else (batch, output.outputs)
            num_samples = output.num_samples * world_size()
            self.callbacks.on_step_end(
                StepEnd(start.stage, start.epoch, num_samples, batch, outputs)
            )

    def evaluate(
        self, loader: BatchLoader, stage: str = "test", epoch: int | None = None
    ) -> pd.DataFrame:
        """Evaluate the current weights.

        Args:
            loader: Loader of the data.
            stage: Stage whose metrics are used.
            epoch: Epoch of the weights; None is the last one trained.

        Returns:
            Table with one row.

        Raises:
            TrainingInterrupted: If a signal requested to stop.
        """
        row = self.run_stage(stage, self.state.epoch if epoch is None else epoch, loader).row
        return summary_table([row])

    def predict(self, loader: BatchLoader) -> Nested:
        """Return the outputs for all samples, on the host.

        They have the structure that `Task.predict_step` returns. Ranks other than 0 get None.

        Raises:
            TrainingInterrupted: If a signal requested to stop.
        """
        parts = [map_tensors(torch.Tensor.cpu, outputs) for _, outputs in self.predictions(loader)]
        return concat(parts) if parts or rank() == 0 else None

    def predictions(self, loader: BatchLoader) -> Iterator[tuple[Batch, Nested]]:
        """Yield each batch with its outputs; rank 0 gets those of all ranks, the others nothing.

        Raises:
            TrainingInterrupted: If a signal requested to stop.
        """
        epoch = self.state.epoch
        start = self.begin_stage(PREDICT, epoch, loader)
        self.task.model.eval()
        with self.stop_signal.deferred_until_step():
            for number, (batch, is_padding) in enumerate(padded_batches(loader, epoch), start=1):
                guard = self.oom.guard_step(PREDICT, epoch, number)
                with guard, torch.no_grad(), self.task.precision.autocast():
                    outputs = self.task.predict_step(batch)
                parts = gather_batches((batch, outputs), is_padding)
                if parts:
                    batch, outputs = concat(parts) if len(parts) > 1 else parts[0]
                    num_samples = count_samples(outputs)
                    step = StepEnd(start.stage, epoch, num_samples, batch, outputs)
                    self.callbacks.on_step_end(step)
                    yield batch, outputs
                self.stop_consensus.after_step()
                if self.stop_consensus.is_signal:
                    break
            self.stop_consensus.finish()
        if self.stop_consensus.is_signal:
            raise TrainingInterrupted(self.stop_consensus.reason)

    def sanity_check(self, valid: BatchLoader | None) -> None:
        """Validate a few batches, so that errors show before the first epoch, not after it."""
        if valid is None or self.limits.sanity_valid_batches == 0:
            return
        accumulator = StageAccumulator(self.task.metrics["valid"], self.device)
        results = self.eval_steps(valid, "valid", 0)
        for _, output, _ in islice(results, self.limits.sanity_valid_batches):
            accumulator.add(output.values)
        if not accumulator.is_empty:
            row = accumulator.result("valid", 0).row
            for monitor in (self.goal, *self.checkpoints.monitors.values()):
                if monitor.stage == "valid":
                    goal_value(row, monitor)

    @contextmanager
    def averaged_weights(self, train: BatchLoader, epoch: int) -> Iterator[None]:
        """Use the averaged weights inside the `with` block, if there are any."""
        with self.averaging.swapped_in():
            if self.averaging.average and self.averaging.needs_bn_update:
                self.update_bn(train, epoch)
            yield

    @torch.no_grad()
    def update_bn(self, train: BatchLoader, epoch: int) -> None:
        """Recompute batch norm statistics with the batches that the epoch was trained on."""
        seed_everything(self.seed, "measured", epoch, *([rank()] if rank() else []))
        self.task.model.eval()
        with recompute_bn_stats(self.task.model) as batchnorms:
            num_batches = self.state.batches_in_epoch if batchnorms else 0
            for batch, is_padding in islice(padded_batches(train, epoch), num_batches):
                with self.strategy.sync_context(is_padding, True), self.task.precision.autocast():
                    self.task.bn_forward(batch)
        self.strategy.on_epoch_end()

    @property
    def has_reached_max_steps(self) -> bool:
        """Whether the maximum number of optimizer steps has been made."""
        return self.limits.max_steps is not None and self.optimizers.steps >= self.limits.max_steps

    def save_mid_epoch(self, accumulator: StageAccumulator) -> None:
        """Save everything needed to resume after the last step, unless training has diverged."""
        self.nonfinite.sync()
        accumulator.mask_last(self.nonfinite.pop_invalid_rows())
        if not self.nonfinite.has_diverged:
            self.checkpoints.save_mid_epoch(accumulator)

    def resume(self, file: Path) -> None:
        """Restore everything from a checkpoint, to resume where it was saved.

        Args:
            file: A `last*.safetensors`.

        Raises:
            UserError: If the file is damaged, or of another model, loss or optimizer.
        """
        self.state.load(file)
        if self.state.schedule_changed:  # replay the epochs for the new schedule
            for epoch in range(1, self.state.epoch + self.state.epoch_finished):
                self.optimizers.on_epoch_end(goal_value_at(self.state.history, self.goal, epoch))
        if self.state.job is not None and self.state.job.differences:
            self.nonfinite.has_diverged = False  # other settings may not diverge

    def resave_missing_best(self, train: BatchLoader) -> None:
        """Save missing or damaged best checkpoints again that the current weights belong in."""
        if not self.state.epoch_finished or self.state.mid_epoch:
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

    def stop_reason(self) -> str | None:
        """Return why training ends early, as text for the log; None to continue."""
        if self.is_pruned:
            return "pruned by the search"
        return reason_to_stop(self.state.history, self.goal)

    @property
    def outcome(self) -> StatusName:
        """How training ended, as in `status.json`."""
        if self.nonfinite.has_diverged:
            return "diverged"
        return "pruned" if self.is_pruned else "completed"

    @property
    def goal(self) -> GoalConfig:
        """Metric that decides which epoch is best."""
        return self.checkpoints.goal

    @property
    def optimizers(self) -> OptimWrapperDict:
        """Optimizer wrappers of the task."""
        return self.state.optimizers

    def make_epoch_end(self, epoch: int, train: BatchLoader, elapsed: float) -> EpochEnd:
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
            elapsed=elapsed,
        )
