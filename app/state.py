"""What survives a restart: in it means in the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
from app.files import write_whole
from app.history import Row
from app.nested import map_tensors
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
        self.epoch = 0
        self.batches = 0  # of training so far
        self.history: list[Row] = []

    def save_best(self) -> None:
        """The weights, as `best.pt` with all that testing needs, and as `model.pt` alone."""
        checkpoint = self._checkpoint(None)
        save_checkpoint(self.folder / "checkpoints" / BEST, checkpoint)
        write_whole(self.folder / "model.pt", lambda file: torch.save(checkpoint.model, file))

    def save_monitored(self, name: str) -> None:
        """The weights, as `best-<name>.pt`."""
        save_checkpoint(self.folder / "checkpoints" / monitored(name), self._checkpoint(None))

    def save_last(self) -> None:
        """Everything, as `last.pt`."""
        assert self.task.learning is not None
        training = {
            "learning": self.task.learning.state_dict(),
            "averaging": self.averaging.state_dict(),
            "batches": self.batches,
        }
        save_checkpoint(self.folder / "checkpoints" / LAST, self._checkpoint(training))

    def restore(self, file: Path) -> int:
        """Takes the weights of a checkpoint, and what the task has beside the model.

        Args:
            file: A checkpoint, or a run folder.

        Returns:
            The epoch of these weights.

        Raises:
            UserError: They are damaged, or those of another model or loss.
        """
        checkpoint = load_checkpoint(file)
        load_weights(self.task.model, checkpoint.model, str(file))
        try:
            self.task.load_state_dict(checkpoint.task)
        except (RuntimeError, KeyError) as error:
            raise UserError(f"{file} is of another task or loss: {error}") from error
        return checkpoint.epoch

    def restore_best(self) -> int:
        """Takes the best weights so far; gives their epoch."""
        return self.restore(self.folder / "checkpoints" / BEST)

    def _checkpoint(self, training: dict[str, Any] | None) -> Checkpoint:
        job = self.job
        return Checkpoint(
            config=job.plain if job else None,
            template=job.template if job else None,
            model=on_host(self.task.model),
            task=map_tensors(Tensor.cpu, self.task.state_dict()),
            epoch=self.epoch,
            history=self.history,
            training=training,
        )


def on_host(model: nn.Module) -> dict[str, Tensor]:
    """The state dict on the host, in the usual memory format."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
