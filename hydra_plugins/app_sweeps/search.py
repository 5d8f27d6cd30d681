"""The plugin `hydra/sweeper=optuna`."""

from __future__ import annotations

from typing import Any, Literal

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class OptunaSweeper(Sweeper):
    """Runs the trials of an Optuna study; implemented in `app.sweep.optuna_search`.

    Args:
        n_trials: Number of trials, not counting retries.
        n_jobs: Number of parallel trials; `auto` for as many as the launcher has slots.
        direction: Direction of the goal, `max` or `min`; None for that of `goal.mode`.
        objectives: Further objectives by name, each with a metric and a mode.
        storage: `sqlite`, `journal` or a database URL.
        study_name: Name of the study; None for that of the folder.
        sampler: Config node of the sampler.
        pruner: Config node of the pruner.
        params: Values of swept keys, written as on the command line.
    """

    def __init__(
        self,
        n_trials: int,
        n_jobs: int | Literal["auto"],
        direction: Literal["max", "min"] | None,
        objectives: dict[str, dict[str, Any]],
        storage: str,
        study_name: str | None,
        sampler: dict[str, Any],
        pruner: dict[str, Any],
        params: dict[str, Any] | None = None,
    ) -> None:
        from app.sweep.search_options import SearchOptions

        self.options = SearchOptions(
            n_trials, n_jobs, direction, objectives, storage, study_name, sampler, pruner
        )
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
