"""Figures of a study."""

from __future__ import annotations

import json
import math

import pytest

optuna = pytest.importorskip("optuna")
from optuna.distributions import CategoricalDistribution, FloatDistribution  # noqa: E402
from optuna.trial import create_trial  # noqa: E402

from app.sweep.report.optuna_figures import study_figures  # noqa: E402

SPACE = {
    "lr": FloatDistribution(1e-4, 1, log=True),
    "model": CategoricalDistribution(["mlp", "cnn", None]),
}
TRIALS = [(0.1, "mlp", 0.5, 3.0), (0.001, "cnn", 0.9, 5.0), (0.01, None, 0.7, 9.0)]


def make_study(num_objectives: int) -> optuna.Study:
    """Return a study of accuracy and time, and one trial that has no finite values."""
    study = optuna.create_study(directions=["maximize", "minimize"][:num_objectives])
    for lr, model, *values in [*TRIALS, (0.1, "mlp", math.inf, math.inf)]:
        params = {"lr": lr, "model": model}
        study.add_trial(
            create_trial(params=params, distributions=SPACE, values=values[:num_objectives])
        )
    return study


def test_study_figures_of_one_objective() -> None:
    figures = study_figures(make_study(1), ["accuracy"])
    json.dumps(figures, allow_nan=False)
    assert list(figures) == [
        "History, accuracy",
        "Parallel coordinates, accuracy",
        "Slice, accuracy: lr",
        "Slice, accuracy: model",
        "Importance, accuracy",
    ]
    best, trials = figures["History, accuracy"]["series"]
    assert trials["y"] == [0.5, 0.9, 0.7]
    assert best["y"] == [0.5, 0.9, 0.9]
    coordinates = figures["Parallel coordinates, accuracy"]
    assert [axis["scale"] for axis in coordinates["axes"]] == ["log", "category", "linear"]
    assert coordinates["axes"][1]["values"] == ["mlp", "cnn", "null"]
    assert coordinates["labels"][1] == "trial 1, accuracy=0.9"
    assert figures["Slice, accuracy: lr"]["series"][0]["x"] == [0.1, 0.001, 0.01]
    assert {name for name, _ in figures["Importance, accuracy"]["bars"]} == {"lr", "model"}


def test_study_figures_of_two_objectives_have_pareto_front() -> None:
    figures = study_figures(make_study(2), ["accuracy", "time"])
    others, best = figures["Pareto front"]["series"]
    assert (others["labels"], best["labels"]) == (["trial 2"], ["trial 0", "trial 1"])
    assert (best["x"], best["y"]) == ([0.5, 0.9], [3.0, 5.0])
    assert figures["History, time"]["series"][0]["y"] == [3.0, 3.0, 3.0]


def test_study_figures_without_completed_trials_are_none() -> None:
    assert study_figures(optuna.create_study(), ["accuracy"]) == {}
