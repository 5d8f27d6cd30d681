"""Limits of training, and when to validate and save."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class SaveSchedule:
    """When checkpoints are saved, and how many are kept.

    Attributes:
        every_n_epochs: Epochs between two saves of `last.safetensors`, which is also saved after
            the last epoch.
        every_n_steps: Optimizer steps between two saves, also within an epoch; None does not save
            by steps.
        every_n_minutes: Minutes between two saves, also within an epoch; None does not save by
            time.
        keep_last: Number of the newest `last*.safetensors` to keep.
        save_top_k: Number of the best epochs whose weights are kept; -1 keeps all epochs.
        in_background: Whether files are written while training continues.
    """

    every_n_epochs: int = 1
    every_n_steps: int | None = None
    every_n_minutes: float | None = None
    keep_last: int = 2
    save_top_k: int = 1
    in_background: bool = False


@dataclass(frozen=True)
class TrainingLimits:
    """How long to train, and when to validate and save.

    Attributes:
        max_epochs: Maximum number of epochs; None if only `max_steps` limits training.
        max_steps: Maximum number of optimizer steps; None if only `max_epochs` limits training.
        valid_every_n_epochs: Epochs between two validations; the last epoch is always validated.
            None validates no other epoch at its end.
        valid_every_n_steps: Optimizer steps between two validations within an epoch; None
            validates at the end of epochs only.
        save_schedule: When checkpoints are saved, and how many are kept.
        sanity_valid_batches: Number of validation batches to run before training, as a check.
        max_seconds: Maximum duration of training; None for no limit.
        log_every_n_steps: Steps whose values are copied to the host at once while a stage runs.
        min_epochs: Number of epochs before which the goal does not end training.
    """

    max_epochs: int | None
    max_steps: int | None = None
    valid_every_n_epochs: int | None = 1
    save_schedule: SaveSchedule = SaveSchedule()
    sanity_valid_batches: int = 1
    max_seconds: float | None = None
    log_every_n_steps: int = 50
    valid_every_n_steps: int | None = None
    min_epochs: int = 0

    def is_validated(self, epoch: int, steps: int) -> bool:
        """Return whether validation is due at the end of an epoch.

        Args:
            epoch: Epoch, counted from 1.
            steps: Number of optimizer steps taken by the end of it.
        """
        by_epochs, by_steps = self.valid_every_n_epochs, self.valid_every_n_steps
        is_due_by_epochs = by_epochs is not None and epoch % by_epochs == 0
        return is_due_by_epochs or (by_steps is not None and steps % by_steps == 0)

    def num_epochs(self, steps_per_epoch: int | None) -> int | None:
        """Return the maximum number of epochs, including an incomplete last one.

        Args:
            steps_per_epoch: Optimizer steps per epoch; None if unknown.

        Returns:
            None if the number is unknown.
        """
        if self.max_steps is None or steps_per_epoch is None:
            return self.max_epochs
        by_steps = math.ceil(self.max_steps / steps_per_epoch)
        return by_steps if self.max_epochs is None else min(by_steps, self.max_epochs)

    def fraction_done(self, epochs: float, steps: int) -> float | None:
        """Return which part of the training is done, from 0 to 1; None if its length is unknown.

        Args:
            epochs: Number of epochs so far, including a part of one.
            steps: Number of optimizer steps so far.
        """
        pairs = ((epochs, self.max_epochs), (steps, self.max_steps))
        parts = [done / limit for done, limit in pairs if limit is not None]
        return min(1.0, max(parts)) if parts else None

    def is_last_epoch(self, epoch: int, steps: int) -> bool:
        """Return whether training ends after this epoch.

        Args:
            epoch: Epoch, counted from 1.
            steps: Number of optimizer steps taken by the end of it.
        """
        by_epochs = self.max_epochs is not None and epoch >= self.max_epochs
        return by_epochs or (self.max_steps is not None and steps >= self.max_steps)
