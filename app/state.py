"""What survives a restart: in it means in the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.averaging import Averaging
from app.checkpoint import (
    BEST,
    LAST,
    Checkpoint,
    load_checkpoint,
    load_weights,
    monitored,
    save_checkpoint,
)
from app.config.errors import UserError
from app.config.schema import Job
from app.distributed import from_first, rank
from app.files import write_whole
from app.history import Row
from app.nested import Nested, map_tensors
from app.parallel import whole
from app.task import Task


class TrainState:
    """Everything that training changes.

    Args:
        task: With the model, what learns it, and what it has beside it.
        averaging: Of the weights.
        folder: Of the run.
        job: Its configuration goes into each checkpoint; None where there is none.
    """

    def __init__(self, task: Task, averaging: Averaging, folder: Path, job: Job | None) -> None:
        self.task, self.averaging = task, averaging
        self.folder, self.job = folder, job
        self.epoch = 0  # the last whose batches have all been learned from
        self.is_over = True  # whether all that follows from it, as its validation, is done
        self.time_is_up = False  # training has ended by the clock
        self.batches = 0  # of training so far
        self.trained = 0  # of them, in the epoch under way or the last
        self.under_way: dict[str, Any] | None = None  # an epoch that was cut: rows and randomness
        self.history: list[Row] = []

    def save_best(self) -> None:
        """The weights, as `best.pt` with all that testing needs, and as `model.pt` alone."""
        checkpoint = self._checkpoint(None)
        self._save(BEST, checkpoint)
        if rank() == 0:
            write_whole(self.folder / "model.pt", lambda file: torch.save(checkpoint.model, file))

    def save_monitored(self, name: str) -> None:
        """The weights, as `best-<name>.pt`."""
        self._save(monitored(name), self._checkpoint(None))

    def save_last(self) -> None:
        """Everything, as `last.pt`."""
        assert self.task.learning is not None
        training = {
            "learning": self.task.learning.state_dict(),
            "averaging": self.averaging.state_dict(),
            "batches": self.batches,
            "trained": self.trained,
            "is_over": self.is_over,
            "time_is_up": self.time_is_up,
            "under_way": self.under_way,
        }
        self._save(LAST, self._checkpoint(on_host(training)))

    def restore(self, file: Path) -> int:
        """Takes the weights of a checkpoint, and what the task has beside the model.

        Args:
            file: A checkpoint, or a run folder.

        Returns:
            The epoch of these weights.

        Raises:
            UserError: They are damaged, or those of another model or loss.
        """
        checkpoint = self._read(file)
        load_weights(self.task.model, checkpoint.model, str(file))
        try:
            self.task.load_state_dict(checkpoint.task)
        except (RuntimeError, KeyError) as error:
            raise UserError(f"{file} is of another task or loss: {error}") from error
        return checkpoint.epoch

    def take_up(self, file: Path) -> None:
        """Takes everything of a `last.pt`, to go on from there.

        Raises:
            UserError: It is of another model, loss or optimizer, or was not saved to go on from.
        """
        self.epoch = self.restore(file)
        checkpoint = self._read(file)
        training = checkpoint.training
        if training is None or "is_over" not in training:
            raise UserError(f"{file} holds weights alone; training goes on from a {LAST}")
        assert self.task.learning is not None
        try:
            self.task.learning.load_state_dict(training["learning"])
            self.averaging.load_state_dict(training["averaging"])
        except (ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"{file} is of another optimizer or average: {error}") from error
        self.batches, self.trained = training["batches"], training["trained"]
        self.is_over, self.under_way = training["is_over"], training["under_way"]
        self.time_is_up = training["time_is_up"]
        self.history = checkpoint.history

    def _read(self, file: Path) -> Checkpoint:
        """Rank 0 reads, the others hear of it."""
        checkpoint = from_first(load_checkpoint(file) if rank() == 0 else None)
        assert checkpoint is not None
        return checkpoint

    def restore_best(self) -> int:
        """Takes the best weights so far; gives their epoch."""
        return self.restore(self.folder / "checkpoints" / BEST)

    def _save(self, name: str, checkpoint: Checkpoint) -> None:
        if rank() == 0:
            save_checkpoint(self.folder / "checkpoints" / name, checkpoint)

    def _checkpoint(self, training: dict[str, Any] | None) -> Checkpoint:
        job = self.job
        return Checkpoint(
            config=job.plain if job else None,
            template=job.template if job else None,
            model=on_host(self.task.model.state_dict()),
            task=on_host(self.task.state_dict()),
            epoch=self.epoch,
            history=self.history,
            training=training,
        )


def on_host(nested: Nested) -> Nested:
    """Whole tensors on the host, in the usual memory format; every rank must ask, one gets them."""

    def held(tensor: Tensor) -> Tensor:
        tensor = whole(tensor.detach())
        return tensor.cpu().contiguous() if rank() == 0 else tensor

    return map_tensors(held, nested)
