"""Options of `hydra/sweeper=optuna`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from app.config.schema import STRICT, MonitorConfig, Positive

NO_PRUNER = "optuna.pruners.NopPruner"
EXHAUSTIVE_SAMPLER = "optuna.samplers.BruteForceSampler"
OWN_STORAGES = ("sqlite", "journal")  # files in the sweep's folder


@dataclass(frozen=True)
class SearchOptions:
    """The keys of `conf/hydra/sweeper/optuna.yaml`, which documents them."""

    __pydantic_config__ = STRICT

    n_trials: Positive
    n_jobs: Positive | Literal["auto"]
    direction: Literal["max", "min"] | None
    objectives: dict[str, MonitorConfig]
    storage: str
    study_name: str | None
    sampler: dict[str, Any]
    pruner: dict[str, Any]
