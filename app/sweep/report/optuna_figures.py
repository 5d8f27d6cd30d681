"""Optuna's plots of a study, for the page of a sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import optuna
from optuna import visualization
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from app.training.pruning import make_storage

PLOTS: dict[str, Callable[..., Any]] = {
    "History": visualization.plot_optimization_history,
    "Parallel coordinates": visualization.plot_parallel_coordinate,
    "Slices": visualization.plot_slice,
}


def study_figures(storage: str, name: str, objectives: Sequence[str]) -> dict[str, str]:
    """Return Plotly figures of a study as JSON by heading; those need enough completed trials.

    Args:
        storage: Storage of the study, as `app.training.pruning.make_storage` takes it.
        name: Name of the study.
        objectives: Names of the objectives.
    """
    study = optuna.load_study(study_name=name, storage=make_storage(storage))
    return _plot_study(study, objectives)


def _plot_study(study: Study, names: Sequence[str]) -> dict[str, str]:
    completed = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    if not completed:
        return {}
    figures: dict[str, str] = {}
    for index, name in enumerate(names):
        target: dict[str, Any] = {"target_name": name}
        if len(names) > 1:
            target["target"] = partial(_objective_value, index)
        plots = {title: plot(study, **target) for title, plot in PLOTS.items()}
        if len({trial.values[index] for trial in completed}) > 1:
            if study.directions[index] is StudyDirection.MAXIMIZE and len(names) > 1:
                # With a target, importance is measured for low values.
                target["target"] = partial(_negative_objective_value, index)
            plots["Importance"] = visualization.plot_param_importances(study, **target)
        figures |= {f"{title}, {name}": figure.to_json() for title, figure in plots.items()}
    if 2 <= len(names) <= 3:
        front = visualization.plot_pareto_front(study, target_names=list(names))
        figures["Pareto front"] = front.to_json()
    return figures


def _objective_value(index: int, trial: FrozenTrial) -> float:
    value: float = trial.values[index]
    return value


def _negative_objective_value(index: int, trial: FrozenTrial) -> float:
    return -_objective_value(index, trial)
