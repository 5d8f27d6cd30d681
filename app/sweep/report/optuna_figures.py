"""Optuna's plots of a study, for the page of a sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from optuna import visualization
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

PLOTS: dict[str, Callable[..., Any]] = {
    "History": visualization.plot_optimization_history,
    "Parallel coordinates": visualization.plot_parallel_coordinate,
    "Slices": visualization.plot_slice,
}


def study_figures(study: Study, objectives: Sequence[str]) -> dict[str, str]:
    """Return Plotly figures of a study as JSON by heading; those need enough completed trials."""
    completed = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    if not completed:
        return {}
    figures: dict[str, Any] = {}
    for index, objective in enumerate(objectives):
        target: dict[str, Any] = {"target_name": objective}
        if len(objectives) > 1:
            target["target"] = partial(_objective_value, index)
        for title, plot in PLOTS.items():
            figures[f"{title}, {objective}"] = plot(study, **target)
        if len({trial.values[index] for trial in completed}) > 1:
            if study.directions[index] is StudyDirection.MAXIMIZE and len(objectives) > 1:
                # With a target, importance is measured for low values.
                target["target"] = partial(_negative_objective_value, index)
            importances = visualization.plot_param_importances(study, **target)
            figures[f"Importance, {objective}"] = importances
    if 2 <= len(objectives) <= 3:
        figures["Pareto front"] = visualization.plot_pareto_front(
            study, target_names=list(objectives)
        )
    return {heading: figure.to_json() for heading, figure in figures.items()}


def _objective_value(index: int, trial: FrozenTrial) -> float:
    value: float = trial.values[index]
    return value


def _negative_objective_value(index: int, trial: FrozenTrial) -> float:
    return -_objective_value(index, trial)
