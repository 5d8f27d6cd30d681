"""The same parts from Python: a Trainer from objects, and `app.compose`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import app
from app.runtime.errors import ConfigError, UserError
from tests.support.runs import Ran


def test_composing_gives_the_objects_of_a_command_line(trained: Ran, tmp_path: Path) -> None:
    words = ["model=mlp", "trainer.max_epochs=2", "trainer.limit_train_batches=6"]
    words += ["trainer.limit_valid_batches=3", "data.batch_size=50"]
    with app.compose(words, str(tmp_path)) as experiment:
        summary = experiment.fit()
        tested = experiment.evaluate()
        predicted = experiment.predict()
    times = ["epoch_time", "samples/s"]
    whole = pd.read_csv(trained.folder / "summary_table.csv")
    expected = whole[whole["stage"] != "test"].dropna(axis=1, how="all").drop(columns=times)
    found = summary.drop(columns=times)
    pd.testing.assert_frame_equal(found[expected.columns], expected.reset_index(drop=True))
    accuracy = whole[whole["stage"] == "test"]["accuracy"].iloc[0]
    assert tested["accuracy"][0] == accuracy
    assert len(predicted) == 10_000
    assert experiment.config.trainer.max_epochs == 2
    for name in ("config.yaml", "status.json", "test_summary_table.csv", "plots/loss.png"):
        assert (tmp_path / name).is_file(), name
    assert '"status": "completed"' in (tmp_path / "status.json").read_text()


def test_composing_with_mistakes_names_them_all(elsewhere: Path) -> None:
    with pytest.raises(ConfigError, match="2 mistakes in the configuration"):
        app.compose(["model=mlpp", "trainer.max_epochs=0"])
    with pytest.raises(UserError, match="a sweep belongs on the command line"):
        app.compose(["-m", "seed=0,1"])
    assert list(elsewhere.iterdir()) == []


def test_the_example_runs(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "examples" / "from_python.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mnist" / "model.pt").is_file()
    spirals = pd.read_csv(tmp_path / "spirals" / "test_summary_table.csv")
    assert spirals["accuracy"][0] > 0.9


def test_a_folder_of_a_run_is_not_composed_into_again(trained: Ran) -> None:
    with pytest.raises(UserError, match="holds a run; it is not overwritten"):
        app.compose(["model=mlp"], str(trained.folder))
    with pytest.raises(UserError, match="mode='check' is for the command line"):
        app.compose(["mode=check"])


def test_several_devices_are_for_the_command_line(elsewhere: Path) -> None:
    with pytest.raises(UserError, match=r"trainer.devices=2: several devices are for the command"):
        app.compose(["model=mlp", "trainer.devices=2"])
    assert not list(elsewhere.iterdir())


@pytest.mark.usefixtures("elsewhere")
def test_a_run_that_was_cut_goes_on_from_python() -> None:
    short = ["trainer.limit_train_batches=3", "trainer.limit_valid_batches=1"]
    words = ["model=mlp", "trainer.max_epochs=1", "scheduler=constant", *short]
    with app.compose(words, folder="run") as first:
        first.fit()
    going_on = ["resume=run", "trainer.max_epochs=2"]
    with app.compose(going_on, folder="run") as second:
        summary = second.fit()
    assert list(summary["epoch"]) == [1, 1, 2, 2]
