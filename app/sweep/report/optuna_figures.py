"""Figures of an Optuna study, for the page of a sweep."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, combinations
from typing import Any

from optuna.distributions import FloatDistribution, IntDistribution
from optuna.importance import get_param_importances
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from app.sweep.report.page import Figure
from app.sweep.report.plots import Scale, axis_scale, format_value, is_number

DOT_SIZE, LINE_WIDTH = 8, 2  # pixels


def study_figures(study: Study, objectives: Sequence[str]) -> dict[str, Figure]:
    """Return figures of a study by heading; they need completed trials."""
    completed = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    trials = [trial for trial in completed if all(map(math.isfinite, trial.values))]
    if not trials:
        return {}
    figures: dict[str, Figure] = {}
    keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
    for index, objective in enumerate(objectives):
        is_maximized = study.directions[index] is StudyDirection.MAXIMIZE
        figures[f"History, {objective}"] = _history(trials, index, objective, is_maximized)
        figures[f"Parallel coordinates, {objective}"] = _parallel_coordinates(
            trials, keys, index, objective, is_maximized
        )
        for key in keys:
            figures[f"Slice, {objective}: {key}"] = _slice(trials, key, index, objective)
        if len({trial.values[index] for trial in trials}) > 1:
            bars = [list(bar) for bar in _importances(study, index, len(objectives))]
            figures[f"Importance, {objective}"] = {"bars": bars}
    if len(objectives) > 1:
        best = {trial.number for trial in study.best_trials}
        for pair in combinations(range(len(objectives)), 2):
            names = [objectives[index] for index in pair]
            heading = (
                "Pareto front" if len(objectives) == 2 else f"Pareto front: {', '.join(names)}"
            )
            figures[heading] = _pareto_front(trials, pair, names, best)
    return figures


def _history(
    trials: Sequence[FrozenTrial], index: int, objective: str, is_maximized: bool
) -> Figure:
    numbers = [trial.number for trial in trials]
    values = [trial.values[index] for trial in trials]
    best = list(accumulate(values, max if is_maximized else min))
    line = {"x": numbers, "y": best, "label": "best so far", "width": LINE_WIDTH}
    return {
        "x": {"title": "trial", "scale": "linear", "integer": True},
        "y": {"title": objective, "scale": "linear"},
        "series": [line | {"color": "var(--best)"}, _dots(trials, numbers, values)],
    }


def _slice(trials: Sequence[FrozenTrial], key: str, index: int, objective: str) -> Figure:
    trials = [trial for trial in trials if key in trial.params]
    scale, values = _param_axis(trials, key)
    return {
        "x": {"title": key, "scale": scale},
        "y": {"title": objective, "scale": "linear"},
        "series": [_dots(trials, values, [trial.values[index] for trial in trials])],
    }


def _parallel_coordinates(
    trials: Sequence[FrozenTrial],
    keys: Sequence[str],
    index: int,
    objective: str,
    is_maximized: bool,
) -> Figure:
    axes = []
    for key in keys:
        scale, values = _param_axis(trials, key)
        axes.append({"label": key, "scale": scale, "values": values})
    measured = [trial.values[index] for trial in trials]
    axes.append({"label": objective, "scale": "linear", "values": measured})
    labels = [
        f"trial {trial.number}, {objective}={value:.5g}"
        for trial, value in zip(trials, measured, strict=True)
    ]
    return {"axes": axes, "labels": labels, "mode": "max" if is_maximized else "min"}


def _pareto_front(
    trials: Sequence[FrozenTrial], pair: tuple[int, int], names: Sequence[str], best: set[int]
) -> Figure:
    """Draw the trials over two objectives, with those that none is better than on top."""
    x, y = pair
    groups = [[t for t in trials if (t.number in best) is is_best] for is_best in (False, True)]
    series = [
        _dots(group, [t.values[x] for t in group], [t.values[y] for t in group]) for group in groups
    ]
    series[0]["color"], series[1]["color"] = "var(--worst)", "var(--best)"
    return {
        "x": {"title": names[0], "scale": "linear"},
        "y": {"title": names[1], "scale": "linear"},
        "series": series,
    }


def _dots(trials: Sequence[FrozenTrial], x: list[Any], y: list[float]) -> dict[str, Any]:
    labels = [f"trial {trial.number}" for trial in trials]
    return {"x": x, "y": y, "labels": labels, "color": "var(--accent)", "size": DOT_SIZE}


def _param_axis(trials: Sequence[FrozenTrial], key: str) -> tuple[Scale, list[Any]]:
    """The scale of a parameter, and its value in each trial; None where a trial has none."""
    params = [trial.params.get(key) for trial in trials]
    found = next(trial.distributions[key] for trial in trials if key in trial.distributions)
    if isinstance(found, FloatDistribution | IntDistribution):
        scale: Scale = "log" if found.log else axis_scale([p for p in params if p is not None])
    else:
        scale = axis_scale([*params])
    if scale == "category":
        return scale, [format_value(param) for param in params]
    return scale, [param if is_number(param) else None for param in params]


def _importances(study: Study, index: int, num_objectives: int) -> Iterator[tuple[str, float]]:
    """Yield the importance of each parameter for an objective, the largest first."""
    target: Callable[[FrozenTrial], float] | None = None
    if num_objectives > 1:
        # With a target, importance is measured for low values.
        sign = -1 if study.directions[index] is StudyDirection.MAXIMIZE else 1
        target = partial(_signed_value, sign, index)
    yield from get_param_importances(study, target=target).items()


def _signed_value(sign: int, index: int, trial: FrozenTrial) -> float:
    value: float = trial.values[index]
    return sign * value
