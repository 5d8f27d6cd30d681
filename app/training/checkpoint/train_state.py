"""What survives a restart: in it means in the checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from app.config.resolve import get_by_path
from app.config.resume import first_difference, optimizer_changed
from app.config.schema import Job
from app.distributed.collectives import broadcast_object, rank
from app.distributed.strategies import full_tensor
from app.runtime.background_writer import BackgroundWriter
from app.runtime.errors import UserError
from app.runtime.nested import Nested, map_tensors
from app.training.checkpoint.checkpoint import (
    BEST_CHECKPOINT,
    Checkpoint,
    epoch_filename,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    write_model,
)
from app.training.checkpoint.checksum import read_info, verify_checksum
from app.training.checkpoint.content_check import check_savable
from app.training.checkpoint.rotation import CHECKPOINT_DIR, LAST_CHECKPOINT, CheckpointRotation, remove_file
from app.training.history import Row
from app.training.optim.optim_wrapper import OptimWrapperDict
from app.training.optim.weight_averaging import WeightAveraging
from app.training.plan import SaveSchedule
from app.training.task import Task

log = logging.getLogger(__name__)
FIXED_WITHIN_EPOCH = (  # cannot be changed in the midst of one
    "seed",
    "data.batch_size",
    "data.sampling",
    "metric.train",
    "trainer.gradient_norm",
)
MISMATCH_ERRORS = (
    ValueError,
    KeyError,
    RuntimeError,
    TypeError,
    IndexError,
    AttributeError,
)  # of others


class Stateful(Protocol):
    """Something whose state goes into a checkpoint: tensors and plain values."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class TrainState:
    """Everything that training changes.

    Args:
        task: With the model, what learns it, and what it has beside it.
        averaging: Of the weights.
        folder: Of the run.
        job: Its configuration goes into each checkpoint; None where there is none.
        watchers: Their states do, too; in rank 0.
        saving: How many states stay, and whether they are written in the background.
    """

    def __init__(
        self,
        task: Task,
        averaging: WeightAveraging,
        folder: Path,
        job: Job | None,
        callbacks: Stateful | None = None,
        save_schedule: SaveSchedule = SaveSchedule(),  # noqa: B008
    ) -> None:
        self.task, self.averaging = task, averaging
        self.folder, self.job, self.callbacks = folder, job, callbacks
        self.rotation, self.writer = (
            CheckpointRotation(folder, save_schedule.keep_last),
            BackgroundWriter(save_schedule.in_background),
        )
        self.save_count = 0  # of states
        self.nonfinite: Stateful | None = None  # what is known of steps that were no numbers
        self.epoch = 0  # the last whose batches have all been learned from
        self.epoch_finished = True  # whether all that follows from it, as its validation, is done
        self.time_is_up = False  # training has ended by the clock
        self.batches = 0  # of training so far
        self.batches_in_epoch = 0  # of them, in the epoch under way or the last
        self.mid_epoch: dict[str, Any] | None = None  # an epoch that was cut: rows and randomness
        self.history: list[Row] = []
        self.schedule_changed = (
            False  # whether the schedule is another than that of the state it went on from
        )

    def save_best(self) -> None:
        """The weights, as `best.pt` with all that testing needs, and as `model.pt` alone."""
        checkpoint = self._checkpoint(None)
        self._save(BEST_CHECKPOINT, checkpoint)
        if rank() == 0:
            path, model = self.folder / "model.pt", checkpoint.model
            self.writer.submit(lambda: write_model(path, model))

    def save_weights(self, name: str) -> None:
        """The weights, as a checkpoint to test with."""
        self._save(name, self._checkpoint(None))

    def remove_stale_epochs(self, epochs: list[int]) -> None:
        """Those `epoch<number>.pt` go whose epochs are not among these."""
        kept = [epoch_filename(epoch) for epoch in epochs]
        for path in (self.folder / CHECKPOINT_DIR).glob("epoch*.pt") if rank() == 0 else ():
            if path.name not in kept:
                remove_file(path)

    def remove_checkpoint(self, name: str) -> None:
        """A checkpoint that is not what its name says."""
        if rank() == 0:
            remove_file(self.folder / CHECKPOINT_DIR / name)

    def save_last(self) -> None:
        """Everything, as `last.pt`."""
        self.save_count += 1
        training = {
            "learning": self.optimizers.state_dict(),
            "averaging": self.averaging.state_dict(),
            "batches": self.batches,
            "trained": self.batches_in_epoch,
            "is_over": self.epoch_finished,
            "time_is_up": self.time_is_up,
            "under_way": self.mid_epoch,
            "watchers": self.callbacks.state_dict() if self.callbacks else {},
            "saves": self.save_count,
            "nonfinite": self.nonfinite.state_dict() if self.nonfinite else {},
        }
        checkpoint = self._checkpoint(self._kept(training))
        if rank() == 0:
            path = self.folder / CHECKPOINT_DIR / LAST_CHECKPOINT
            self.writer.submit(lambda: save_checkpoint(path, checkpoint, self.rotation), True)

    @contextmanager
    def flushed(self) -> Iterator[None]:
        """What is saved inside is on the disk in the end, however it comes."""
        try:
            yield
        finally:
            self.writer.wait()

    def load_weights(self, file: Path) -> int:
        """Takes the weights of a checkpoint, and what the task has beside the model.

        Args:
            file: A checkpoint, or a run folder.

        Returns:
            The epoch of these weights.

        Raises:
            UserError: They are damaged, or those of another model or loss.
        """
        return self._restore(file, self._read(file))

    def _restore(self, file: Path, checkpoint: Checkpoint) -> int:
        load_weights(self.task.model, checkpoint.model, str(file))
        try:
            self.task.load_state_dict(checkpoint.task)
        except MISMATCH_ERRORS as error:
            raise UserError(f"{file} is of another task or loss: {error}") from error
        return checkpoint.epoch

    def load(self, file: Path) -> None:
        """Takes everything of a state, to go on from there.

        Raises:
            UserError: It is of another model, loss or optimizer, or was not saved to go on from.
        """
        checkpoint = self._read(file)
        self.epoch = self._restore(file, checkpoint)
        training = checkpoint.training
        if training is None or "is_over" not in training:
            raise UserError(f"{file} holds weights alone; training goes on from a {LAST_CHECKPOINT}")
        self._check_mid_epoch(file, checkpoint)
        try:
            self.schedule_changed = self._optimizer_changed(checkpoint.config)
            self.optimizers.load_state_dict(training["learning"], self.schedule_changed)
            self.averaging.load_state_dict(training["averaging"])
        except MISMATCH_ERRORS as error:
            raise UserError(f"{file} is of another optimizer or average: {error}") from error
        try:
            self._load_extras(training)
        except MISMATCH_ERRORS as error:
            raise UserError(f"{file} is of other callbacks: {error!r}") from error
        self.batches, self.batches_in_epoch = training["batches"], training["trained"]
        self.epoch_finished, self.mid_epoch = training["is_over"], training["under_way"]
        self.time_is_up = training["time_is_up"] and not self._has_more_time(checkpoint.config)
        self.history, self.save_count = checkpoint.history, training["saves"]
        self.rotation.resume_from(file)

    def _load_extras(self, training: dict[str, Any]) -> None:
        """What is beside the weights and what learns them."""
        if self.nonfinite is not None and training["nonfinite"]:
            self.nonfinite.load_state_dict(training["nonfinite"])
        if self.callbacks is not None:
            self.callbacks.load_state_dict(training["watchers"])

    def _check_mid_epoch(self, file: Path, checkpoint: Checkpoint) -> None:
        """What is left of an epoch has the batches and the columns of what is over."""
        training = checkpoint.training or {}
        if self.job is None or not checkpoint.config or not training["under_way"]:
            return
        before, now = checkpoint.config, self.job.plain
        changes = (
            first_difference(get_by_path(before, key), get_by_path(now, key), key)
            for key in FIXED_WITHIN_EPOCH
        )
        for change in filter(None, changes):
            raise UserError(
                f"{change}: {file} was saved in the midst of an epoch, the rest of which cannot be "
                "another; allowed: as it was, or a state from its end"
            )

    def _optimizer_changed(self, saved: dict[str, Any] | None) -> bool:
        return (
            saved is not None and self.job is not None and optimizer_changed(saved, self.job.plain)
        )

    def _has_more_time(self, saved: dict[str, Any] | None) -> bool:
        if saved is None or self.job is None:
            return False
        max_time: bool = saved["trainer"]["max_time"] != self.job.config.trainer.max_time
        return max_time

    def _read(self, file: Path) -> Checkpoint:
        """Rank 0 reads, the others hear of it."""
        self.writer.wait()
        checkpoint = broadcast_object(load_checkpoint(file) if rank() == 0 else None)
        assert checkpoint is not None
        return checkpoint

    @property
    def optimizers(self) -> OptimWrapperDict:
        """How the weights change."""
        assert self.task.optimizers is not None, "the task learns nothing: it has no optimizer"
        return self.task.optimizers

    def saved_epoch(self, name: str, whole: bool = True) -> int | None:
        """Whose weights a file has; None where it is gone or damaged; the same in all ranks.

        Args:
            name: Of a checkpoint.
            whole: All of it is read, not what it says of itself alone.
        """
        self.writer.wait()
        epoch = None
        if rank() == 0:
            read = verify_checksum if whole else read_info
            with suppress(UserError):  # who asks says what follows
                epoch = read(self.folder / CHECKPOINT_DIR / name).epoch
        return broadcast_object(epoch)

    def load_best_weights(self) -> int:
        """Takes the best weights so far; gives their epoch."""
        return self.load_weights(self.folder / CHECKPOINT_DIR / BEST_CHECKPOINT)

    def _save(self, name: str, checkpoint: Checkpoint) -> None:
        if rank() == 0:
            path = self.folder / CHECKPOINT_DIR / name
            self.writer.submit(lambda: save_checkpoint(path, checkpoint))

    def _checkpoint(self, training: dict[str, Any] | None) -> Checkpoint:
        job = self.job
        task = self._kept(self.task.state_dict())
        if rank() == 0:
            check_savable("task", task)
            check_savable("training", training)
        return Checkpoint(
            config=job.plain if job else None,
            template=job.template if job else None,
            model=self._kept(self.task.model.state_dict()),
            task=task,
            epoch=self.epoch,
            history=self.history,
            training=training,
            number=self.save_count,
        )

    def _kept(self, nested: Nested) -> Nested:
        """On the host; a copy where it is written while training goes on."""
        kept = gather_to_cpu(nested)
        return map_tensors(torch.clone, kept) if self.writer.in_background else kept


def gather_to_cpu(nested: Nested) -> Nested:
    """Whole tensors on the host, in the usual memory format; every rank must ask, one gets them."""

    def held(tensor: Tensor) -> Tensor:
        tensor = full_tensor(tensor.detach())
        return tensor.cpu().contiguous() if rank() == 0 else tensor

    return map_tensors(held, nested)
