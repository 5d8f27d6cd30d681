"""What surrounds a step: autocast, sums over accumulated batches, padding, averages, errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice

import torch

from app.data.batch import BatchLoader
from app.distributed.collectives import all_reduce_async, rank
from app.distributed.strategies import SingleDevice
from app.runtime.rank_sums import StepSums, padding
from app.runtime.seed import rng_state, seed_everything, set_rng_state
from app.training.nonfinite import NonFinitePolicy
from app.training.oom import OOMReporter
from app.training.optim.freezing import FreezeSchedule
from app.training.optim.weight_averaging import WeightAveraging, recompute_bn_stats
from app.training.rank_sync import StepBatch, step_batches
from app.training.task import Task


class StepContext:
    """Runs the code that every step has in common around the steps of a task.

    Args:
        task: Task whose steps are run.
        strategy: How gradients are synchronized over ranks.
        freezing: Which parameters are frozen in which epochs.
        averaging: Average of the weights, used in every evaluation.
        nonfinite: What to do about a step that is not finite.
        oom: Reports a step that runs out of memory.
    """

    def __init__(
        self,
        task: Task,
        strategy: SingleDevice,
        freezing: FreezeSchedule,
        averaging: WeightAveraging,
        nonfinite: NonFinitePolicy,
        oom: OOMReporter,
    ) -> None:
        self.task, self.strategy, self.freezing = task, strategy, freezing
        self.averaging, self.nonfinite, self.oom = averaging, nonfinite, oom
        self.needs_look_ahead: bool | None = None  # unknown before the first epoch
        self.step_sums = StepSums()

    def prepare_epoch(self, loader: BatchLoader, epoch: int) -> None:
        """Do what comes before the first step, which the time of the epoch does not contain.

        It records the step if it is replayed, and finds out whether the loss needs sums over
        accumulated batches.
        """
        assert self.task.optimizers is not None
        can_look_ahead = self.task.optimizers.accumulate > 1 and self.task.can_look_ahead
        tries_loss = can_look_ahead and self.needs_look_ahead is None
        if not tries_loss and not self.task.replays_steps:
            return
        self.task.model.train()
        self.freezing.apply(epoch)
        if tries_loss:
            sums = self._sums_of_step(epoch, [StepBatch(loader.first(2), 1)])
            self.needs_look_ahead = bool(sums.totals)
        if self.task.replays_steps:
            with self.task.precision.autocast():
                self.task.prepare_steps(loader.first)

    def look_ahead(self, batches: Iterator[StepBatch], epoch: int) -> Iterator[StepBatch]:
        """Yield the batches, those of each optimizer step once the loss has its sums over them."""
        assert self.task.optimizers is not None
        while step := list(islice(batches, self.task.optimizers.accumulate)):
            self.step_sums = self._sums_of_step(epoch, step)
            yield from step

    @torch.no_grad()
    def _sums_of_step(self, epoch: int, batches: list[StepBatch]) -> StepSums:
        """Return the sums of the loss over the batches; restore buffers and random states."""
        sums, rng = StepSums(), rng_state()
        buffers = [buffer for module in self.task.modules for buffer in module.buffers()]
        kept = [buffer.clone() for buffer in buffers]
        for batch in batches:
            sync = self.strategy.sync_context(batch.is_padding, True)
            with self._forward("train", epoch, batch), sync, sums.add_batch():
                count = self.task.look_ahead(batch.data, epoch)
            sums.finish_batch(all_reduce_async(0 if batch.is_padding else count)())
        for buffer, earlier in zip(buffers, kept, strict=True):
            buffer.copy_(earlier)
        set_rng_state(rng)
        return sums

    def start_epoch(self, loader: BatchLoader, epoch: int) -> None:
        """Prepare for an epoch of training."""
        self.task.model.train()
        self.freezing.apply(epoch)
        self.strategy.on_epoch_start()
        self.nonfinite.on_epoch_start(loader, epoch)

    @contextmanager
    def train_step(self, epoch: int, batch: StepBatch, global_step: int) -> Iterator[None]:
        """Wrap a training step, including its backward pass and its optimizer step.

        Args:
            epoch: Epoch that is trained.
            batch: Batch of the step.
            global_step: Number of the batch in the run, counted from 1.

        Raises:
            UserError: The step runs out of memory.
            NonFiniteError: A step was not finite and the policy is to raise.
        """
        assert self.task.optimizers is not None
        self.nonfinite.on_batch_start(batch, global_step)
        steps_next = self.task.optimizers.steps_next
        sync = self.strategy.sync_context(batch.is_padding, steps_next)
        with self._forward("train", epoch, batch), sync, self._totals():
            yield
        self.nonfinite.on_batch_end()
        self.averaging.update(epoch, self.task.optimizers.steps)

    def _totals(self) -> AbstractContextManager[None]:
        """Return a context in which the loss gets its sums over all batches of the step."""
        assert self.task.optimizers is not None
        if not self.needs_look_ahead:
            return nullcontext()
        return self.step_sums.use_totals(self.task.optimizers.batches)

    @contextmanager
    def eval_step(self, stage: str, epoch: int, batch: StepBatch) -> Iterator[None]:
        """Wrap an evaluation or prediction step.

        Raises:
            UserError: The step runs out of memory.
        """
        with torch.no_grad(), self._forward(stage, epoch, batch):
            yield

    @contextmanager
    def _forward(self, stage: str, epoch: int, batch: StepBatch) -> Iterator[None]:
        pads = self._padding(stage) if batch.is_padding else nullcontext()
        try:
            with pads, self.task.precision.autocast():
                yield
        except (RuntimeError, MemoryError) as error:
            self.oom.raise_if_out_of_memory(error, stage, epoch, batch.number)
            raise

    @contextmanager
    def _padding(self, stage: str) -> Iterator[None]:
        """Let the samples of a step count for nothing."""
        metrics = self.task.metrics.get(stage)
        with metrics.paused() if metrics is not None else nullcontext(), padding():
            yield

    def finish_epoch(self, epoch: int) -> None:
        """Step with the gradients that are left, and handle the results of the last steps.

        Raises:
            NonFiniteError: A step was not finite and the policy is to raise.
        """
        assert self.task.optimizers is not None
        self.task.optimizers.flush()
        self.nonfinite.sync()
        self.averaging.update(epoch, self.task.optimizers.steps)
        self.strategy.on_epoch_end()

    @contextmanager
    def averaged_weights(
        self, train: BatchLoader, epoch: int, num_batches: int, seed: int
    ) -> Iterator[None]:
        """Use the averaged weights inside the `with` block, if there are any.

        Args:
            train: Loader of the training data, to recompute batch norm statistics.
            epoch: Epoch whose batches are used for that.
            num_batches: Number of these batches.
            seed: Seed of the run.
        """
        with self.averaging.swapped_in():
            if self.averaging.average and self.averaging.needs_bn_update:
                seed_stage(seed, "measured", epoch)
                self._update_bn(train, epoch, num_batches)
            yield

    @torch.no_grad()
    def _update_bn(self, train: BatchLoader, epoch: int, num_batches: int) -> None:
        self.task.model.eval()
        with recompute_bn_stats(self.task.model) as batchnorms:
            for batch in islice(step_batches(train, epoch), num_batches if batchnorms else 0):
                sync = self.strategy.sync_context(batch.is_padding, True)
                with sync, self.task.precision.autocast():
                    self.task.bn_forward(batch.data)
        self.strategy.on_epoch_end()


def seed_stage(seed: int, stage: str, epoch: int) -> None:
    """Seed all random number generators by seed, stage, epoch and rank."""
    seed_everything(seed, stage, epoch, *([rank()] if rank() else []))
