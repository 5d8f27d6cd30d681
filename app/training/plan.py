"""How long to train, and what comes when."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class SaveSchedule:
    """When the state of training is written, and what of it stays.

    Attributes:
        every_n_epochs: And after the last.
        every_n_steps: Of the optimizer, in the midst of epochs, too; None: not by steps.
        every_n_minutes: Likewise by the clock.
        keep_last: How many of the newest states stay.
        save_top_k: The weights of how many of the best epochs stay; -1 of all.
        in_background: Files are written while training goes on.
    """

    every_n_epochs: int = 1
    every_n_steps: int | None = None
    every_n_minutes: float | None = None
    keep_last: int = 2
    save_top_k: int = 1
    in_background: bool = False


@dataclass(frozen=True)
class TrainingLimits:
    """How long to train, and what comes when.

    Attributes:
        max_epochs: None where `max_steps` ends it.
        max_steps: Of the optimizer; None where `max_epochs` ends it.
        valid_every_n_epochs: And after the last.
        saving: When the state is written, and what of it stays.
        sanity_valid_batches: Validated before training.
        max_seconds: Of training; None where only the others end it.
    """

    max_epochs: int | None
    max_steps: int | None = None
    valid_every_n_epochs: int = 1
    save_schedule: SaveSchedule = SaveSchedule()
    sanity_valid_batches: int = 1
    max_seconds: float | None = None

    def num_epochs(self, steps_per_epoch: int | None) -> int | None:
        """Epochs at most, the last one perhaps cut short; None where that is not known."""
        if self.max_steps is None or steps_per_epoch is None:
            return self.max_epochs
        by_steps = math.ceil(self.max_steps / steps_per_epoch)
        return by_steps if self.max_epochs is None else min(by_steps, self.max_epochs)

    def is_last_epoch(self, epoch: int, steps: int) -> bool:
        """Whether that epoch, after so many steps of the optimizer, is the last."""
        by_epochs = self.max_epochs is not None and epoch >= self.max_epochs
        return by_epochs or (self.max_steps is not None and steps >= self.max_steps)
