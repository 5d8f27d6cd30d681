"""What of a training is kept on the disk, and when: the best weights, and states to go on from."""

from __future__ import annotations

from collections.abc import Mapping

from app.checkpoint import BEST, monitored
from app.config.schema import Goal, Monitor
from app.cut import position
from app.history import best_epochs, is_best
from app.learning import Learning
from app.plan import Saving
from app.records import Rows
from app.state import TrainState
from app.together import Due


class Keeping:
    """Keeps the best weights, and all that is needed to go on.

    Args:
        state: Of the training.
        saving: When, and how many.
        goal: What best means.
        monitors: Further meanings of best, by name.
    """

    def __init__(
        self, state: TrainState, saving: Saving, goal: Goal, monitors: Mapping[str, Monitor]
    ) -> None:
        self.state, self.saving, self.goal, self.monitors = state, saving, goal, dict(monitors)
        self.due = Due(saving.every_n_steps, saving.every_n_minutes)

    def last(self) -> None:
        """All that is needed to go on."""
        self.state.save_last()
        self.due.saved(self.learning.steps)

    def is_time(self) -> bool:
        """Whether that is wanted now, in the midst of an epoch; every rank must ask."""
        return self.due.after_step(self.learning.steps) and self.learning.is_between_steps

    def under_way(self, rows: Rows) -> None:
        """All that is needed to go on after the step just made."""
        self.state.under_way = position(rows, self.state.trained)
        self.last()
        self.state.under_way = None

    def best(self, epoch: int) -> None:
        """The weights, where this epoch is the best by the goal, or by a monitor."""
        history = self.state.history
        if self.saving.save_top_k != 1:
            self.state.save_among_best(best_epochs(history, self.goal, self.saving.save_top_k))
        if is_best(history, self.goal, epoch):
            self.state.save_best()
        for name, monitor in self.monitors.items():
            if is_best(history, monitor, epoch):
                self.state.save_monitored(name)

    def best_again(self) -> None:
        """The weights that training goes on from, where they are the best and their file is not."""
        if self.has_lost(BEST, self.goal):
            self.state.save_best()
        for name, monitor in self.monitors.items():
            if self.has_lost(monitored(name), monitor):
                self.state.save_monitored(name)

    def has_lost(self, name: str, monitor: Monitor) -> bool:
        """Whether the best weights are those of the state, and no longer in their file."""
        epoch = self.state.epoch
        is_last = self.state.is_over and is_best(self.state.history, monitor, epoch)
        return is_last and self.state.epoch_of(name) != epoch

    @property
    def learning(self) -> Learning:
        """Whose steps are counted."""
        return self.state.learning
