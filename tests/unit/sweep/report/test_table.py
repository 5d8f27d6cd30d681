"""Tables of the results of a sweep."""

from __future__ import annotations

import pandas as pd
import pytest

from app.config.schema import MonitorConfig
from app.sweep.report.table import Results, aggregate_by_config, best_run, sort_by_goal


def test_aggregate_by_config_averages_completed_runs_only() -> None:
    table = pd.DataFrame(
        {
            "job": [0, 1, 2, 3],
            "status": ["completed", "completed", "failed", "pruned"],
            "lr": [0.1, 0.1, 0.1, 0.2],
            "seed": [0, 1, 2, 0],
            "best_accuracy": [0.5, 0.7, 0.1, 0.9],
            "seconds": [1.0, 3.0, 9.0, 9.0],
            "samples/s": [1.0, 1.0, None, 1.0],
        }
    )
    results = Results("", table, ["lr", "seed"], [MonitorConfig("accuracy", "max")], {})
    averages = aggregate_by_config(results)
    assert averages["lr"].tolist() == [0.1, 0.2]
    assert averages["jobs"].tolist() == [3, 1]
    assert averages["completed"].tolist() == [2, 0]
    assert averages["best_accuracy_mean"][0] == pytest.approx(0.6)
    assert averages["best_accuracy_std"][0] == pytest.approx(0.02**0.5)
    assert averages["seconds_mean"][0] == 2.0
    assert averages.loc[1, ["best_accuracy_mean", "best_accuracy_std"]].isna().all()


def test_sort_by_goal_puts_best_first_and_missing_last() -> None:
    table = pd.DataFrame({"job": [0, 1, 2], "best_loss": [0.5, None, 0.2]})
    results = Results("", table, [], [MonitorConfig("loss", "min")], {})
    assert sort_by_goal(results)["job"].tolist() == [2, 0, 1]
    best = best_run(results)
    assert best is not None
    assert best["job"] == 2
    assert best_run(Results("", table.assign(best_loss=None), [], results.goals, {})) is None
