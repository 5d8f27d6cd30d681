"""Training from the weights of another run, on the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from app.training.checkpoint.checkpoint import load_checkpoint
from tests.support.runs import FEW_BATCHES, RunResult


def attempts(folder: Path) -> list[dict[str, Any]]:
    content = json.loads((folder / "environment.json").read_text())
    return list(content["attempts"])


def test_run_starts_from_a_run_and_resumes_without_it(
    app: Callable[..., RunResult], trained_run: RunResult, tmp_path: Path
) -> None:
    source = tmp_path / "source.safetensors"
    shutil.copy(trained_run.folder / "checkpoints" / "best.safetensors", source)
    command = ("model=mlp", *FEW_BATCHES, "optimizer.lr=0", "trainer.max_epochs=1")
    run = app(*command, "init.weights=source.safetensors", "init.skip=['*.bias']")
    assert run.code == 0, run.err
    table = pd.read_csv(run.folder / "initial_weights.csv")
    assert sorted(set(table["match"])) == ["skipped", "taken"]
    assert "initial weights: " in (run.folder / "run.log").read_text()
    (record,) = [attempt["initial_weights"] for attempt in attempts(run.folder)]
    assert record["weights"] == str(source)
    assert len(record["sha256"]) == 64
    model = load_checkpoint(run.folder).model
    expected = load_checkpoint(source).model
    same = {name: bool((model[name] == expected[name]).all()) for name in model}
    assert same == {name: name.endswith(".weight") for name in model}

    source.unlink()
    resumed = app(f"resume={run.folder}", "trainer.max_epochs=2")
    assert resumed.code == 0, resumed.err
    assert [attempt["initial_weights"] for attempt in attempts(run.folder)] == [record, None]
    tested = app("mode=test", f"ckpt={run.folder}")
    assert tested.code == 0, tested.err


def test_sweep_over_initial_weights_trains_each(
    app: Callable[..., RunResult], trained_run: RunResult, tmp_path: Path
) -> None:
    weights = f"init.weights={trained_run.folder},null"
    swept = app("-m", "model=mlp", "trainer.fast_dev_run=true", weights)
    assert swept.code == 0, swept.err
    tables = list((tmp_path / "outputs" / "sweeps").glob("*/*/*/initial_weights.csv"))
    assert len(tables) == 1


def test_initial_weights_that_fit_nothing_end_the_check_and_write_nothing(
    app: Callable[..., RunResult], trained_run: RunResult, tmp_path: Path
) -> None:
    checked = app("mode=check", "model=lenet", f"init.weights={trained_run.folder}")
    assert checked.code != 0
    assert "no tensor fits the model; the file has" in checked.err
    assert not (tmp_path / "outputs").exists()
