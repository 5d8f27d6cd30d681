"""The training loop: when to train, validate, save and stop."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from itertools import islice, pairwise
from pathlib import Path

import pandas as pd
import torch

from app.data.batch import BatchLoader
from app.distributed.collectives import broadcast_object, rank
from app.runtime.errors import UserError
from app.runtime.folders import held_folder, make_folder
from app.runtime.nested import Nested, concat, map_tensors
from app.runtime.signals import StopReason, TrainingInterrupted
from app.training.accumulator import StageAccumulator
from app.training.checkpoint.rotation import BEST_CHECKPOINT
from app.training.checkpoint.train_state import Phase, TrainingEnd
from app.training.events import EpochEnd, StageStart
from app.training.history import (
    Point,
    StatusName,
    goal_value,
    goal_value_at,
    point_of,
    reason_to_stop,
    summary_table,
)
from app.training.stage_loop import StageLoop
from app.training.time_left import TrainingClock

log = logging.getLogger(__name__)
END_BY_REASON = {StopReason.TIME: TrainingEnd.TIME, StopReason.CALLBACK: TrainingEnd.CALLBACK}


class Trainer(StageLoop):
    """Trains, validates, tests and predicts with a task.

    Example::

        optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1)
        trainer = Trainer(task, TrainingLimits(max_epochs=10), "run", optimizer=optimizer)
        summary = trainer.fit(train_loader, valid_loader)
        trainer.state.load_best_weights()
        trainer.evaluate(test_loader)

    The arguments are those of `StageLoop`.
    """

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
            UserError: The folder already contains another run, the task has no optimizer, or
                validation within epochs has no data.
        """
        if self.task.optimizers is None:
            raise UserError(
                "the task has no optimizer; pass one: Trainer(..., optimizer=...), or call "
                "task.prepare_training"
            )
        if valid is None and self.limits.valid_every_n_steps is not None:
            raise UserError("trainer.valid_every_n_steps needs validation data")
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
                self.paused = None
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
        state = self.state
        if self.has_finished_training():
            log.warning("nothing to train: training ended after epoch %d", state.epoch)
            return
        self.sanity_check(valid)
        self.clock = TrainingClock(self.limits, train.num_batches, self.optimizers.accumulate)
        self.clock.start(state.epoch, state.batches, self.optimizers.steps)
        while True:
            epoch = state.next_epoch
            if state.phase is Phase.TRAIN:
                self.train_part(epoch, train)
            self.finish_part(epoch, train, valid)
            if state.end is not None:
                break
        self.clock = self.paused = None

    def train_part(self, epoch: int, train: BatchLoader) -> None:
        """Train until the epoch ends or a validation is due within it."""
        state = self.state
        self.run_stage("train", epoch, train, is_training=True)
        if self.paused is None:
            state.epoch = epoch
            self.steps.averaging.on_epoch_end(epoch)
        state.phase, state.point = Phase.VALID, self.point(epoch)

    def finish_part(self, epoch: int, train: BatchLoader, valid: BatchLoader | None) -> None:
        """Validate if it is due, save, and decide whether training goes on."""
        state, is_complete = self.state, self.state.mid_epoch is None
        state.end = self.limit_reached(state.epoch)
        with self.averaged_weights(train, epoch):
            if valid is not None and self.should_validate(epoch, is_complete):
                self.run_stage("valid", epoch, valid)
            self.checkpoints.save_best()
        value = goal_value_at(state.history, self.goal, state.point)
        self.optimizers.on_epoch_end(value, is_complete)
        state.phase = Phase.TRAIN
        early_end = self.early_end()
        state.end = state.end or early_end
        is_due = epoch % self.limits.save_schedule.every_n_epochs == 0 or not is_complete
        if state.end or is_due:
            self.checkpoints.save_last()
        self.callbacks.on_epoch_end(self.make_epoch_end(is_complete))
        if state.end is None and self.callback_asks_to_stop():
            state.end = early_end = TrainingEnd.CALLBACK
            self.checkpoints.save_last()
        if early_end is not None:
            log.info("stopped after %s: %s", state.point, self.describe_early_end(early_end))

    def should_validate(self, epoch: int, is_complete: bool) -> bool:
        """Return whether validation is due; it always is within an epoch and after the last one."""
        is_last = self.state.end is not None
        return is_last or not is_complete or self.limits.is_validated(epoch, self.optimizers.steps)

    def limit_reached(self, epoch: int) -> TrainingEnd | None:
        """Return why this epoch is the last one, whatever its validation shows; None if not."""
        if self.steps.nonfinite.has_diverged:
            return TrainingEnd.DIVERGED
        if self.stop.reason in END_BY_REASON:
            return END_BY_REASON[self.stop.reason]
        is_last = self.limits.is_last_epoch(epoch, self.optimizers.steps)
        return TrainingEnd.LIMIT if is_last else None

    def early_end(self) -> TrainingEnd | None:
        """Return why the history ends training before its limits; None to continue."""
        is_pruned = self.pruning.should_prune(self.state.history)  # also reports to the search
        if is_pruned and self.state.end is None:
            return TrainingEnd.PRUNED
        if self.callback_asks_to_stop():
            return TrainingEnd.CALLBACK
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
        if end is TrainingEnd.CALLBACK:
            return self.callbacks.stop_reason
        return self.goal_end()

    def callback_asks_to_stop(self) -> bool:
        """Return whether a callback asks to end the training; all ranks must call this."""
        return broadcast_object(self.callbacks.stop_reason is not None)

    def has_finished_training(self) -> bool:
        """Return whether a resumed run has nothing left to train."""
        state = self.state
        if not state.is_between_parts:
            return False
        if state.end in (TrainingEnd.TIME, TrainingEnd.PRUNED, TrainingEnd.CALLBACK):
            return True
        if self.limit_reached(state.epoch) is not None:
            return True
        return state.batches > 0 and self.goal_end() is not None

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

    def sanity_check(self, valid: BatchLoader | None) -> None:
        """Validate a few batches, so that errors show before the first epoch, not after it."""
        if valid is None or self.limits.sanity_valid_batches == 0:
            return
        accumulator = StageAccumulator(self.task.metrics["valid"], self.device)
        start = StageStart("valid", Point(0), valid.num_batches, valid.num_samples)
        steps = islice(self.eval_steps(valid, start), self.limits.sanity_valid_batches)
        for _, output, _ in steps:
            accumulator.add(output.values)
        if not accumulator.is_empty:
            row = accumulator.result("valid", Point(0)).row
            for monitor in (self.goal, *self.checkpoints.monitors.values()):
                if monitor.stage == "valid":
                    goal_value(row, monitor)

    def averaged_weights(self, train: BatchLoader, epoch: int) -> AbstractContextManager[None]:
        """Use the averaged weights inside the `with` block, if there are any."""
        num_batches = self.state.batches_in_epoch
        if self.paused and self.steps.averaging.needs_bn_update:
            self.paused.batches = None  # no loader is read twice at a time
        return self.steps.averaged_weights(train, epoch, num_batches, self.seed)

    def resume(self, file: Path) -> None:
        """Restore everything from a checkpoint, to resume where it was saved.

        Args:
            file: A `last*.safetensors`.

        Raises:
            UserError: The file is damaged, or of another model, loss or optimizer.
        """
        state = self.state
        if state.load(file):
            self.replay_epochs()
        state.point = self.point(state.epoch + (state.mid_epoch is not None))
        if state.job is not None and state.job.differences:
            self.steps.nonfinite.has_diverged = False  # other settings may not diverge

    def replay_epochs(self) -> None:
        """Update the learning rates of a new schedule as if it had been used from the start."""
        history = self.state.history
        points = list(dict.fromkeys(point_of(row) for row in history if row["stage"] != "test"))
        for point, following in pairwise([*points, Point(self.state.next_epoch)]):
            value = goal_value_at(history, self.goal, point)
            self.optimizers.on_epoch_end(value, is_complete=following.epoch > point.epoch)

    def resave_missing_best(self, train: BatchLoader) -> None:
        """Save missing or damaged best checkpoints again that the current weights belong in."""
        if not self.state.is_between_parts:
            return
        missing = self.checkpoints.missing(self.state.point)
        if missing:
            with self.averaged_weights(train, self.state.point.epoch):
                for name in missing:
                    self.checkpoints.save(name)

    def replace_missing_best(self, train: BatchLoader) -> None:
        """Warn of missing best checkpoints; `best.safetensors` gets the last weights instead."""
        for name, point in self.checkpoints.missing().items():
            if name == BEST_CHECKPOINT:
                log.warning(
                    "%s: the weights of the best epoch %s are lost (the file is missing, damaged "
                    "or of another epoch); saving the weights of the last epoch %d instead",
                    name,
                    str(point).removeprefix("epoch "),
                    self.state.epoch,
                )
                with self.averaged_weights(train, self.state.epoch):
                    self.state.save_best()
            else:
                log.warning(
                    "%s: the weights of %s are lost (the file is missing, damaged or of another "
                    "epoch)",
                    name,
                    point,
                )
                self.state.remove_checkpoint(name)

    @property
    def outcome(self) -> StatusName:
        """How training ended, as in `status.json`."""
        if self.steps.nonfinite.has_diverged:
            return "diverged"
        return "pruned" if self.state.end is TrainingEnd.PRUNED else "completed"

    def make_epoch_end(self, is_complete: bool) -> EpochEnd:
        """Return what callbacks receive after an epoch or a part of one."""
        assert self.clock is not None
        state, elapsed, left = self.state, self.clock.elapsed(), self.seconds_left()
        return EpochEnd(state.point, state.history, self.goal, elapsed, left, is_complete)
