"""`hydra/sweeper=grid`."""

from __future__ import annotations

from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class GridSweeper(Sweeper):
    """Every combination of the swept values; `app.sweep` does the work.

    Args:
        params: By key the values, as they would be typed.
    """

    def __init__(self, params: dict[str, Any] | None = None) -> None:
        self.params = dict(params or {})

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """What Hydra tells before it begins."""
        self.context, self.task, self.config = hydra_context, task_function, config

    def sweep(self, arguments: list[str]) -> None:
        """Runs all jobs; ends the process where not all went well."""
        from app.sweep.grid import GridJobs
        from app.sweep.run import Sweep, run_sweep

        assert self.config is not None
        sweep = Sweep(self.config, self.context, self.task, arguments, self.params)
        run_sweep(sweep, GridJobs)
