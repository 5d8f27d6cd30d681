"""How far a training is, and when it will be done."""

from __future__ import annotations

import math
import time

from app.training.limits import TrainingLimits

SECONDS_BETWEEN_UPDATES = 0.1  # of what callbacks see after each step


class TrainingClock:
    """Expects the rest of a training to take as long as the part since the start or the resume.

    That includes validation, checkpoints and everything else between the steps.

    Args:
        limits: How long to train.
        batches_per_epoch: Number of batches in an epoch; None if unknown.
        accumulate: Batches per optimizer step.
    """

    def __init__(
        self, limits: TrainingLimits, batches_per_epoch: int | None, accumulate: int
    ) -> None:
        self.limits, self.batches_per_epoch = limits, batches_per_epoch
        per_epoch = None if batches_per_epoch is None else math.ceil(batches_per_epoch / accumulate)
        self.num_epochs = limits.num_epochs(per_epoch)
        self.started, self.done_before = time.monotonic(), 0.0
        self.left: float | None = None  # as last computed
        self.next_update = 0.0

    def start(self, epochs: int, batches: int, steps: int) -> None:
        """Start to measure; the arguments are those of `seconds_left`."""
        self.started = time.monotonic()
        self.done_before = self._done(epochs, batches, steps) or 0.0

    def elapsed(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self.started

    def seconds_left(self, epochs: int, batches: int, steps: int) -> float | None:
        """Return the expected seconds until the end; None if they are unknown.

        Args:
            epochs: Number of complete epochs.
            batches: Number of training batches so far, over all epochs.
            steps: Number of optimizer steps so far.
        """
        done = self._done(epochs, batches, steps)
        self.next_update, self.left = time.monotonic() + SECONDS_BETWEEN_UPDATES, None
        if done is not None and done > self.done_before:
            self.left = self.elapsed() * (1 - done) / (done - self.done_before)
        return self.left

    def is_up_to_date(self) -> bool:
        """Return whether `left` was computed a moment ago."""
        return time.monotonic() < self.next_update

    def _done(self, epochs: int, batches: int, steps: int) -> float | None:
        exact = batches / self.batches_per_epoch if self.batches_per_epoch else epochs
        return self.limits.fraction_done(exact, steps)
