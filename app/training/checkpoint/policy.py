"""Decide which checkpoints to save, and when."""

from __future__ import annotations

from collections.abc import Mapping

from app.config.schema import GoalConfig, MonitorConfig
from app.training.accumulator import StageAccumulator
from app.training.checkpoint.checkpoint import monitor_filename, top_k_filename
from app.training.checkpoint.mid_epoch import save_position
from app.training.checkpoint.rotation import BEST_CHECKPOINT
from app.training.checkpoint.train_state import TrainState
from app.training.history import Point, best_epoch, top_k_points
from app.training.limits import SaveSchedule
from app.training.optim.optim_wrapper import OptimWrapperDict
from app.training.rank_sync import SaveTimer


class CheckpointPolicy:
    """Save the best weights, and training checkpoints to resume from.

    Args:
        state: State of the training.
        save_schedule: When to save, and how many checkpoints to keep.
        goal: Which epoch is the best.
        monitors: Additional criteria for the best epoch, by name.
    """

    def __init__(
        self,
        state: TrainState,
        save_schedule: SaveSchedule,
        goal: GoalConfig,
        monitors: Mapping[str, MonitorConfig],
    ) -> None:
        self.state, self.schedule = state, save_schedule
        self.goal, self.monitors = goal, dict(monitors)
        self.timer = SaveTimer(save_schedule.every_n_steps, save_schedule.every_n_minutes)

    def save_last(self) -> None:
        """Save a training checkpoint."""
        self.state.save_last()
        self.timer.mark_saved(self.optimizers.steps)

    def is_due(self) -> bool:
        """Return whether to save within the epoch now; every rank must call this."""
        return self.timer.is_due(self.optimizers.steps) and self.optimizers.at_step_boundary

    def save_mid_epoch(self, accumulator: StageAccumulator) -> None:
        """Save a training checkpoint after the current step of an epoch."""
        self.state.mid_epoch = save_position(accumulator, self.state.batches_in_epoch)
        self.save_last()
        self.state.mid_epoch = None

    def save_best(self) -> None:
        """Save the current weights if they are the best by the goal or by a monitor."""
        for name, best in self.expected().items():
            if best == self.state.point:
                self.save(name)
        if self.schedule.save_top_k != 1:
            self.state.remove_stale_top_k(self._top_k_points())

    def expected(self) -> dict[str, Point]:
        """Return the best-weights files that should exist, each with when it was measured."""
        monitors = {
            BEST_CHECKPOINT: self.goal,
            **{monitor_filename(n): m for n, m in self.monitors.items()},
        }
        found = {
            name: best_epoch(self.state.history, monitor) for name, monitor in monitors.items()
        }
        top = self._top_k_points() if self.schedule.save_top_k != 1 else []
        return {top_k_filename(point): point for point in top} | {
            name: best.point for name, best in found.items() if best is not None
        }

    def missing(self, point: Point | None = None) -> dict[str, Point]:
        """Return the expected files that are missing, damaged, or have other weights.

        A file has other weights if the run resumed from a checkpoint older than it.

        Args:
            point: Check only the files with the weights of this point, and read them completely.
                None checks all files but reads only `best.safetensors` completely.
        """
        complete = point is not None
        return {
            name: best
            for name, best in self.expected().items()
            if point in (None, best)
            and self.state.saved_point(name, complete or name == BEST_CHECKPOINT) != best
        }

    def save(self, name: str) -> None:
        """Save the current weights under the name of a best-weights file."""
        if name == BEST_CHECKPOINT:
            self.state.save_best()
        else:
            self.state.save_weights(name)

    def _top_k_points(self) -> list[Point]:
        return top_k_points(self.state.history, self.goal, self.schedule.save_top_k)

    @property
    def optimizers(self) -> OptimWrapperDict:
        """Optimizers whose steps are counted."""
        return self.state.optimizers
