"""`hydra/sweeper=optuna`."""

from __future__ import annotations

from typing import Any, Literal

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class OptunaSweeper(Sweeper):
    """Trials that a study of Optuna's asks for; `app.sweep.optuna_search` does the work.

    Args:
        n_trials: How many.
        n_jobs: At once; `auto` as many as the launcher has slots.
        direction: Of the goal; None takes it from there.
        objectives: Further ones, by name.
        storage: Where the study is kept.
        study_name: None takes that of the folder.
        sampler: A node; it draws.
        pruner: A node; it ends hopeless trials.
        params: By key the values, as they would be typed.
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
        """What Hydra tells before it begins."""
        self.context, self.task, self.config = hydra_context, task_function, config

    def sweep(self, arguments: list[str]) -> None:
        """Runs all trials; ends the process where not all went well."""
        from functools import partial

        from app.sweep.optuna_search import OptunaJobs
        from app.sweep.run import Sweep, run_sweep

        assert self.config is not None
        sweep = Sweep(self.config, self.context, self.task, arguments, self.params)
        run_sweep(sweep, partial(OptunaJobs, options=self.options))
