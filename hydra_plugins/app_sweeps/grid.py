"""The plugin `hydra/sweeper=grid`."""

from __future__ import annotations

from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class GridSweeper(Sweeper):
    """Runs every combination of the swept values; implemented in `app.sweep.grid`.

    Args:
        params: Values of swept keys, written as on the command line.
    """

    def __init__(self, params: dict[str, Any] | None = None) -> None:
        self.params = dict(params or {})

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Store what Hydra passes before the sweep."""
        self.context, self.task, self.config = hydra_context, task_function, config

    def sweep(self, arguments: list[str]) -> None:
        """Run all jobs; exit the process with an error code unless every job has finished."""
        from app.sweep.grid import GridJobs
        from app.sweep.run import Sweep, run_sweep

        assert self.config is not None
        sweep = Sweep(self.config, self.context, self.task, arguments, self.params)
        run_sweep(sweep, GridJobs)
