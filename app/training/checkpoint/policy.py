"""What of a training is kept on the disk, and when: the best weights, and states to go on from."""

from __future__ import annotations

from collections.abc import Mapping

from app.config.schema import GoalConfig, MonitorConfig
from app.training.accumulator import StageAccumulator
from app.training.checkpoint.checkpoint import BEST_CHECKPOINT, epoch_filename, monitor_filename
from app.training.checkpoint.mid_epoch import save_position
from app.training.checkpoint.train_state import TrainState
from app.training.history import best_epoch, top_k_epochs
from app.training.optim.optim_wrapper import OptimWrapperDict
from app.training.plan import SaveSchedule
from app.training.rank_sync import SaveTimer


class CheckpointPolicy:
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
        save_schedule: SaveSchedule,
        goal: GoalConfig,
        monitors: Mapping[str, MonitorConfig],
    ) -> None:
        self.state, self.schedule, self.goal, self.monitors = state, save_schedule, goal, dict(monitors)
        self.timer = SaveTimer(save_schedule.every_n_steps, save_schedule.every_n_minutes)

    def save_last(self) -> None:
        """All that is needed to go on."""
        self.state.save_last()
        self.timer.mark_saved(self.optimizers.steps)

    def is_due(self) -> bool:
        """Whether that is wanted now, in the midst of an epoch; every rank must ask."""
        return self.timer.is_due(self.optimizers.steps) and self.optimizers.at_step_boundary

    def save_mid_epoch(self, rows: StageAccumulator) -> None:
        """All that is needed to go on after the step just made."""
        self.state.mid_epoch = save_position(rows, self.state.batches_in_epoch)
        self.save_last()
        self.state.mid_epoch = None

    def save_best(self, epoch: int) -> None:
        """The weights, where this epoch is the best by the goal, or by a monitor."""
        for name, wanted in self.expected().items():
            if wanted == epoch:
                self.save(name)
        if self.schedule.save_top_k != 1:
            self.state.remove_stale_epochs(self._among_best())

    def expected(self) -> dict[str, int]:
        """The epoch whose weights each file of the best is to have, as the history says."""
        monitors = {BEST_CHECKPOINT: self.goal, **{monitor_filename(n): m for n, m in self.monitors.items()}}
        found = {
            name: best_epoch(self.state.history, monitor) for name, monitor in monitors.items()
        }
        top = self._among_best() if self.schedule.save_top_k != 1 else []
        return {epoch_filename(epoch): epoch for epoch in top} | {
            name: one.epoch for name, one in found.items() if one is not None
        }

    def missing(self, epoch: int | None = None) -> dict[str, int]:
        """Of what is wanted, what is gone or damaged, or of an epoch that the run went back from.

        Args:
            epoch: Of the weights; None is any. All of these files are read, of others `best.pt`.
        """
        every = epoch is not None
        return {
            name: one
            for name, one in self.expected().items()
            if epoch in (None, one) and self.state.saved_epoch(name, every or name == BEST_CHECKPOINT) != one
        }

    def save(self, name: str) -> None:
        """The weights as they are now, as a file of the best."""
        if name == BEST_CHECKPOINT:
            self.state.save_best()
        else:
            self.state.save_weights(name)

    def _among_best(self) -> list[int]:
        return top_k_epochs(self.state.history, self.goal, self.schedule.save_top_k)

    @property
    def optimizers(self) -> OptimWrapperDict:
        """Whose steps are counted."""
        return self.state.optimizers
