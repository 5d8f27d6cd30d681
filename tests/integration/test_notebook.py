"""`app.compose`: the objects of a command line, from Python."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

import app
from app.runtime.errors import ConfigError, UserError
from tests.support.runs import RunResult
from tests.support.warm import WarmCommand


def test_compose_trains_and_evaluates_like_the_command_line(
    trained_run: RunResult, tmp_path: Path
) -> None:
    overrides = ["model=mlp", "trainer.max_epochs=2", "trainer.limit_train_batches=6"]
    overrides += ["trainer.limit_valid_batches=3", "data.batch_size=50"]
    with app.compose(overrides, str(tmp_path)) as experiment:
        summary = experiment.fit()
        test_row = experiment.evaluate()
        predictions = experiment.predict()
    times = ["epoch_time", "samples/s"]
    full_table = pd.read_csv(trained_run.folder / "summary_table.csv")
    without_test = full_table[full_table["stage"] != "test"]
    expected = without_test.dropna(axis=1, how="all").drop(columns=times)
    actual = summary.drop(columns=times)
    pd.testing.assert_frame_equal(actual[expected.columns], expected.reset_index(drop=True))
    accuracy = full_table[full_table["stage"] == "test"]["accuracy"].iloc[0]
    assert test_row["accuracy"][0] == accuracy
    assert len(predictions) == 10_000
    assert list(predictions.columns[:3]) == ["sample", "target", "label"]
    assert (predictions["target"] == predictions["label"]).mean() == pytest.approx(accuracy)
    assert experiment.config.trainer.max_epochs == 2
    for name in (
        "config.yaml",
        "status.json",
        "environment.json",
        "test_summary_table.csv",
        "plots/loss.png",
    ):
        assert (tmp_path / name).is_file(), name
    assert '"status": "completed"' in (tmp_path / "status.json").read_text()


def test_compose_with_invalid_overrides_reports_all_errors(tmp_cwd: Path) -> None:
    with pytest.raises(ConfigError, match="2 errors in the configuration"):
        app.compose(["model=mlpp", "trainer.max_epochs=0"])
    with pytest.raises(UserError, match="run sweeps from the command line"):
        app.compose(["-m", "seed=0,1"])
    assert list(tmp_cwd.iterdir()) == []


def test_compose_prints_the_log_unless_logging_is_set_up(tmp_path: Path) -> None:
    script = (
        "import sys, app\n"
        "if sys.argv[2:]: import logging; logging.basicConfig(level=logging.ERROR)\n"
        "options = ['model=mlp', 'debug=fast', '~callbacks.plots']\n"
        "with app.compose(options, sys.argv[1]) as experiment:\n"
        "    experiment.fit()\n"
    )
    (tmp_path / "script.py").write_text(script)
    for arguments, is_shown in [("1",), True], [("2", "logging"), False]:
        command = WarmCommand(tmp_path, arguments, {}, module="script")
        out, _ = command.communicate()
        assert command.returncode == 0, out
        assert ("best accuracy" in out) is is_shown


def test_example_from_python_runs(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(Path(__file__).parents[2] / "examples")}
    command = WarmCommand(tmp_path, [str(tmp_path)], environment, module="from_python")
    out, _ = command.communicate()
    assert command.returncode == 0, out
    assert (tmp_path / "mnist" / "model.pt").is_file()
    spirals = pd.read_csv(tmp_path / "spirals" / "test_summary_table.csv")
    assert spirals["accuracy"][0] > 0.9


def test_compose_into_folder_of_a_run_is_rejected(trained_run: RunResult) -> None:
    with pytest.raises(UserError, match="already contains a run, which is not overwritten"):
        app.compose(["model=mlp"], str(trained_run.folder))
    with pytest.raises(UserError, match="mode='check' is for the command line"):
        app.compose(["mode=check"])


def test_compose_with_several_devices_is_rejected(tmp_cwd: Path) -> None:
    with pytest.raises(UserError, match=r"trainer.devices=2: training on several devices needs"):
        app.compose(["model=mlp", "trainer.devices=2"])
    assert not list(tmp_cwd.iterdir())


@pytest.mark.usefixtures("tmp_cwd")
def test_compose_with_resume_continues_the_run() -> None:
    short = ["trainer.limit_train_batches=3", "trainer.limit_valid_batches=1"]
    overrides = ["model=mlp", "trainer.max_epochs=1", "scheduler=constant", *short]
    with app.compose(overrides, folder="run") as first:
        first.fit()
    with app.compose(["resume=run", "trainer.max_epochs=2"], folder="run") as second:
        summary = second.fit()
    assert list(summary["epoch"]) == [1, 1, 2, 2]


@pytest.mark.usefixtures("tmp_cwd")
def test_compose_with_resume_starts_a_run_without_checkpoint_again() -> None:
    options = ["model=mlp", "optimizer.lr=0.03", "trainer.max_epochs=1", "data.batch_size=50"]
    short = ["trainer.limit_train_batches=3", "trainer.limit_valid_batches=1"]
    with pytest.raises(KeyboardInterrupt), app.compose([*options, *short], folder="run"):
        raise KeyboardInterrupt
    with app.compose(["resume=run"], folder="run") as again:
        summary = again.fit()
    assert again.config.optimizer["lr"] == 0.03
    assert summary["total_samples"].tolist() == [150, 50]
    Path("run", "checkpoints", "last.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"data\.split\.seed: .* cannot be changed"):
        app.compose(["resume=run", "data.split.seed=4"], folder="run")
    with pytest.raises(UserError, match="is not the folder of the run to resume: resume=run"):
        app.compose(["resume=run"], folder="other")
    Path("run", "checkpoints", "start.json").unlink()
    with pytest.raises(ConfigError, match=r"nothing was started there .* resume=auto hydra\.run"):
        app.compose(["resume=run"], folder="run")
