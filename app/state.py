"""What survives a restart: in it means in the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from app.checkpoint import BEST, LAST, Checkpoint, save_checkpoint
from app.config.schema import Job
from app.files import write_whole
from app.history import Row
from app.optimization import Optimization
from app.schedule import Schedule


class TrainState:
    """Everything that training changes.

    Args:
        model: With the weights.
        optimization: With the optimizer, its schedule and scaler; None where nothing is learned.
        folder: Of the run.
        job: Its configuration goes into each checkpoint.
    """

    def __init__(
        self,
        model: nn.Module,
        optimization: Optimization | None,
        folder: Path,
        job: Job,
    ) -> None:
        self.model, self._optimization = model, optimization
        self.folder, self.job = folder, job
        self.epoch = 0
        self.history: list[Row] = []

    @property
    def optimization(self) -> Optimization:
        """How the weights change."""
        assert self._optimization is not None, "nothing is learned here"
        return self._optimization

    @property
    def schedule(self) -> Schedule:
        """Of the learning rate."""
        return self.optimization.schedule

    def save_best(self) -> None:
        """The weights, as `best.pt` with all that testing needs, and as `model.pt` alone."""
        state = on_host(self.model)
        save_checkpoint(self.folder / "checkpoints" / BEST, self._checkpoint(state, None))
        write_whole(self.folder / "model.pt", lambda file: torch.save(state, file))

    def save_last(self) -> None:
        """Everything, as `last.pt`."""
        checkpoint = self._checkpoint(on_host(self.model), self.optimization.state_dict())
        save_checkpoint(self.folder / "checkpoints" / LAST, checkpoint)

    def _checkpoint(self, model: dict[str, Tensor], training: dict[str, Any] | None) -> Checkpoint:
        config, template = self.job.plain, self.job.template
        return Checkpoint(config, template, model, self.epoch, self.history, training)


def on_host(model: nn.Module) -> dict[str, Tensor]:
    """The state dict on the host, in the usual memory format."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
