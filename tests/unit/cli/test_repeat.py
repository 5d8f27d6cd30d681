"""`app repeat` around the run itself: what it refuses, warns of and prints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.callbacks.tables import Tables
from app.cli import repeat
from app.data.loaders import make_loader
from tests.support.toy_training import DATA, make_mlp, make_trainer

ENVIRONMENT = {"python": "3.0", "packages": {"torch": "1.0"}, "device": "cpu (2 threads)"}


def no_run(_: list[str]) -> int:
    raise AssertionError("started")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a finished run."""
    folder = tmp_path / "runs" / "my run"
    trainer = make_trainer(folder, make_mlp(), 1, callbacks=Tables(folder))
    trainer.fit(make_loader(DATA, 32))
    write_json(folder / "status.json", {"status": "completed", "mode": "train"})
    write_json(folder / "checkpoints" / "start.json", {"seed": 3, "trainer": {"max_time": None}})
    write_json(folder / "environment.json", {"attempts": [ENVIRONMENT]})
    return folder


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def copying(run: Path, change: Callable[[Path], object] = lambda _: None) -> Any:
    """Return a stand-in for the run itself, which copies the results of another run."""

    def run_command(arguments: list[str]) -> int:
        (text, *rest) = arguments
        assert rest == ["trusted_targets=[mine]"]
        folder = Path(text.removeprefix("resume='").removesuffix("'"))
        assert json.loads((folder / "checkpoints" / "start.json").read_text())["seed"] == 3
        shutil.copytree(run, folder, dirs_exist_ok=True)
        change(folder)
        return 0

    return run_command


def repeat_main(run: Path, run_command: Any, *arguments: str) -> int:
    return repeat.main([str(run), *arguments, "trusted_targets=[mine]"], run_command)


def test_repeat_equal_run_is_beside_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert repeat_main(run, copying(run)) == 0
    assert repeat_main(run, copying(run)) == 0
    assert repeat_main(run, copying(run), "--output", str(run.parent / "x")) == 0
    folders = sorted(path.name for path in run.parent.iterdir())
    assert folders == ["my run", "my run_repeat", "my run_repeat-2", "x"]
    output = capsys.readouterr()
    assert "weights: equal (8 tensors)" in output.out
    assert f"equal: {run} and {run.parent / 'x'}" in output.out
    assert "warning: package torch: 1.0 before" in output.err
    assert "warning: python: 3.0 before" in output.err
    assert "device" not in output.err


def test_repeat_different_table_is_exit_code_1(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(folder: Path) -> None:
        file = folder / "summary_table.csv"
        file.write_text(file.read_text().replace("train", "\x1b"))

    assert repeat_main(run, copying(run, change)) == 1
    output = capsys.readouterr().out
    place = "summary_table.csv, row 1, column stage"
    assert rf"first difference: {place}: train in the run, \x1b now" in output
    assert "tables: different" in output
    assert "weights: equal" in output


def test_repeat_different_environment_is_warned_of_once(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(folder: Path) -> None:
        record = {**ENVIRONMENT, "device": "cuda (X)", "python": repeat_python()}
        write_json(folder / "environment.json", {"attempts": [record]})

    assert repeat_main(run, copying(run, change)) == 0
    errors = capsys.readouterr().err
    assert errors.count("python: 3.0 before") == 1
    assert "warning: device: cpu before, cuda (X) now" in errors


def repeat_python() -> Any:
    from app.experiment.environment import code_record

    return code_record()["python"]


def test_repeat_resumed_with_other_settings_is_warned_of(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resumed = {"overrides": ["resume=x", "optimizer.lr=2"]}
    write_json(run / "environment.json", {"attempts": [ENVIRONMENT, resumed]})
    write_json(run / "checkpoints" / "start.json", {"seed": 3, "trainer": {"max_time": 9}})
    repeat_main(run, copying(run))
    errors = capsys.readouterr().err
    assert "the run was resumed with optimizer.lr=2, which now applies from the beginning" in errors
    assert "trainer.max_time ends the run by the clock" in errors
    (run / "environment.json").unlink()
    repeat_main(run, copying(run))
    assert "it is unknown what made the run" in capsys.readouterr().err


def test_repeat_run_that_does_not_start_leaves_no_folder(run: Path) -> None:
    assert repeat_main(run, lambda _: 2) == 2
    assert [path.name for path in run.parent.iterdir()] == ["my run"]


def test_repeat_run_that_fails_keeps_its_folder_and_code(run: Path) -> None:
    def fail(arguments: list[str]) -> int:
        folder = Path(arguments[0].removeprefix("resume='").removesuffix("'"))
        write_json(folder / "status.json", {"status": "failed"})
        return 74

    assert repeat_main(run, fail) == 74
    assert (run.parent / "my run_repeat" / "status.json").exists()


@pytest.mark.parametrize(
    ("status", "message"),
    [
        ({}, "contains no run: it has no status.json"),
        ({"status": "completed", "mode": "test"}, "is a run of mode='test'; only training"),
        ({"status": "failed", "mode": "train"}, "is 'failed', so that there are no final results"),
        ({"status": ["\x1b"], "mode": "train"}, r"is ['\x1b'], so that"),
    ],
)
def test_repeat_unfinished_run_is_refused(
    run: Path, status: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(run / "status.json", status)
    assert repeat_main(run, no_run) == 2
    assert message in capsys.readouterr().err
    assert len(list(run.parent.iterdir())) == 1


def test_repeat_used_output_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert repeat_main(run, no_run, "--output", str(run)) == 2
    assert "is not empty; name a new folder" in capsys.readouterr().err
    (run / "checkpoints" / "start.json").unlink()
    assert repeat_main(run, no_run) == 2


def test_repeat_under_torchrun_is_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert repeat_main(run, no_run) == 2
    assert "starts its ranks itself" in capsys.readouterr().err
