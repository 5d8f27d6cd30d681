"""What of a training is kept on the disk, and when: the best weights, and states to go on from."""

from __future__ import annotations

from collections.abc import Mapping

from app.config.schema import GoalConfig, MonitorConfig
from app.training.accumulator import Rows
from app.training.checkpoint.checkpoint import BEST, monitored, of_epoch
from app.training.checkpoint.mid_epoch import position
from app.training.checkpoint.train_state import TrainState
from app.training.history import best, best_epochs
from app.training.optim.optim_wrapper import Learning
from app.training.plan import Saving
from app.training.rank_sync import Due


class Keeping:
    """Keeps the best weights, and all that is needed to go on.

    Args:
        state: Of the training.
        saving: When, and how many.
        goal: What best means.
        monitors: Further meanings of best, by name.
    """

    def __init__(
        self,
        state: TrainState,
        saving: Saving,
        goal: GoalConfig,
        monitors: Mapping[str, MonitorConfig],
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
        for name, wanted in self.wanted().items():
            if wanted == epoch:
                self.save(name)
        if self.saving.save_top_k != 1:
            self.state.remove_others(self._among_best())

    def wanted(self) -> dict[str, int]:
        """The epoch whose weights each file of the best is to have, as the history says."""
        monitors = {BEST: self.goal, **{monitored(n): m for n, m in self.monitors.items()}}
        found = {name: best(self.state.history, monitor) for name, monitor in monitors.items()}
        top = self._among_best() if self.saving.save_top_k != 1 else []
        return {of_epoch(epoch): epoch for epoch in top} | {
            name: one.epoch for name, one in found.items() if one is not None
        }

    def lost(self, epoch: int | None = None) -> dict[str, int]:
        """Of what is wanted, what is gone or damaged, or of an epoch that the run went back from.

        Args:
            epoch: Of the weights; None is any. All of these files are read, of others `best.pt`.
        """
        every = epoch is not None
        return {
            name: one
            for name, one in self.wanted().items()
            if epoch in (None, one) and self.state.epoch_of(name, every or name == BEST) != one
        }

    def save(self, name: str) -> None:
        """The weights as they are now, as a file of the best."""
        if name == BEST:
            self.state.save_best()
        else:
            self.state.save_weights(name)

    def _among_best(self) -> list[int]:
        return best_epochs(self.state.history, self.goal, self.saving.save_top_k)

    @property
    def learning(self) -> Learning:
        """Whose steps are counted."""
        return self.state.learning
