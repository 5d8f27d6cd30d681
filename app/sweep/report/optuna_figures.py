"""Optuna's own pictures of a study, for the page of a sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import optuna
from optuna import visualization
from optuna.study import Study, StudyDirection
from optuna.trial import TrialState

from app.training.pruning import make_storage

PLOTS: dict[str, Callable[..., Any]] = {
    "History": visualization.plot_optimization_history,
    "Parallel coordinates": visualization.plot_parallel_coordinate,
    "Slices": visualization.plot_slice,
}


def study_figures(storage: str, name: str, objectives: Sequence[str]) -> dict[str, str]:
    """By heading plotly's JSON; none of what too few trials can tell.

    Args:
        storage: Where the study is kept, as `app.training.pruning.make_storage` takes it.
        name: Of the study.
        objectives: Their names.
    """
    study = optuna.load_study(study_name=name, storage=make_storage(storage))
    return _drawn(study, objectives)


def _drawn(study: Study, names: Sequence[str]) -> dict[str, str]:
    done = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    if not done:
        return {}
    drawn: dict[str, str] = {}
    for place, name in enumerate(names):
        of_name: dict[str, Any] = {"target_name": name}
        if len(names) > 1:
            of_name["target"] = partial(_value, place)
        plots = {title: draw(study, **of_name) for title, draw in PLOTS.items()}
        if len({trial.values[place] for trial in done}) > 1:
            if study.directions[place] is StudyDirection.MAXIMIZE and len(names) > 1:
                of_name["target"] = partial(_negative, place)  # what makes it low is looked for
            plots["Importance"] = visualization.plot_param_importances(study, **of_name)
        drawn |= {f"{title}, {name}": figure.to_json() for title, figure in plots.items()}
    if 2 <= len(names) <= 3:
        front = visualization.plot_pareto_front(study, target_names=list(names))
        drawn["Pareto front"] = front.to_json()
    return drawn


def _value(place: int, trial: Any) -> float:
    value: float = trial.values[place]
    return value


def _negative(place: int, trial: Any) -> float:
    return -_value(place, trial)
