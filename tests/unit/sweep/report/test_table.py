"""Tables of the results of a sweep."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest

from app.config.schema import MonitorConfig
from app.runtime.files import write_json, write_text
from app.sweep.report import table
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


def test_collect_results_keeps_curves_of_best_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"a": 0.1, "b": 0.9, "c": 0.5}.items():
        status = {
            "status": "completed",
            "goal": {"metric": "accuracy", "mode": "max"},
            "best": {"value": value, "epoch": 1},
        }
        write_json(tmp_path / name / "status.json", status)
        rows = f"epoch,stage,loss_mean\n1,train,{value}\n1,valid,\n"
        write_text(tmp_path / name / "summary_table.csv", rows)
    monkeypatch.setattr(table, "MAX_CURVES", 2)
    results = table.collect_results("", table.list_runs(tmp_path), tmp_path)
    assert results.table["folder"].tolist() == ["a", "b", "c"]
    assert sorted(results.curves) == ["b", "c"]
    assert results.curves["b"]["train"] == {"epoch": [1.0], "loss": [0.9]}
    assert math.isnan(results.curves["b"]["valid"]["loss"][0])


def test_list_runs_keys_that_differ_are_looked_up(tmp_path: Path) -> None:
    """A key that one run sets is read from the configuration, or the choices, of the others."""
    for name, override in {"a": "model=mlp", "b": "optimizer.lr=0.1", "c": "seed=1"}.items():
        write_json(tmp_path / name / "status.json", {"status": "completed"})
        write_text(tmp_path / name / ".hydra" / "overrides.yaml", f"- {override}\n")
        choices = {"hydra": {"runtime": {"choices": {"model": "cnn"}}}}
        write_json(tmp_path / name / ".hydra" / "hydra.yaml", choices)
        config = {"model": {"width": 1}, "optimizer": {"lr": 0.5}, "seed": 1}
        write_json(tmp_path / name / "config.yaml", config)
    results = table.collect_results("", table.list_runs(tmp_path), tmp_path)
    assert results.keys == ["model", "optimizer.lr"]
    assert results.table["model"].tolist() == ["mlp", "cnn", "cnn"]
    assert results.table["optimizer.lr"].tolist() == [0.5, 0.1, 0.5]
