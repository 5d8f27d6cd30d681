"""The plugin `hydra/sweeper=optuna`."""

from __future__ import annotations

from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class OptunaSweeper(Sweeper):
    """Runs the trials of an Optuna study; implemented in `app.sweep.optuna_search`.

    Args:
        objectives: Further objectives by name, each with a metric and a mode.
        params: Values of swept keys, written as on the command line.
        **options: The other fields of `app.sweep.search_options.SearchOptions`.
    """

    def __init__(
        self,
        objectives: dict[str, dict[str, Any]],
        params: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        from app.config.schema import MonitorConfig
        from app.sweep.search_options import SearchOptions

        monitors = {name: MonitorConfig(**node) for name, node in objectives.items()}
        self.options = SearchOptions(objectives=monitors, **options)
        self.params = dict(params or {})

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Store what Hydra passes before the sweep."""
        self.context, self.task, self.config = hydra_context, task_function, config

    def sweep(self, arguments: list[str]) -> None:
        """Run all trials; exit the process with an error code unless every job has finished."""
        from functools import partial

        from app.sweep.optuna_search import OptunaJobs
        from app.sweep.run import Sweep, run_sweep

        assert self.config is not None
        sweep = Sweep(self.config, self.context, self.task, arguments, self.params)
        run_sweep(sweep, partial(OptunaJobs, options=self.options))
