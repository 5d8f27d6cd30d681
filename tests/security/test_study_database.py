"""Databases of Optuna studies in the sweep folders of strangers, with code in every place."""

from __future__ import annotations

import json
import os
import pickle
import sqlite3
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.samplers import CmaEsSampler
from optuna.storages import BaseStorage
from optuna.trial import TrialState, create_trial

from app.runtime.errors import UserError
from app.sweep.folder import SweepFolder
from app.sweep.report.write import search_figures
from app.training.pruning import make_storage
from tests.support.sweeps import open_search, sweep_errors, write_search

SPACE = {key: FloatDistribution(0.0, 1.0) for key in ("x", "y")}
ARGUMENTS = ["x=interval(0,1)", "y=interval(0,1)"]
NUM_TRIALS = 12


class WritesFile:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.file,)


def write_poisoned_study(storage: BaseStorage, name: str, marker: Path) -> None:
    """Write a study with a pickle in all attributes, and in the parts that CMA-ES joins."""
    code = pickle.dumps(WritesFile(marker)).hex()
    halves = (code[: len(code) // 2], code[len(code) // 2 :])
    kinds = ("cma", "sepcma", "cmawm")
    parts = {f"{kind}:optimizer:{n}": half for kind in kinds for n, half in enumerate(halves)}
    attributes = {**parts, "cma:generation": 0, "grid_id": code, "fixed_params": {"x": code}}
    study = optuna.create_study(study_name=name, storage=storage)
    storage.set_study_system_attr(study._study_id, "cma:optimizer:0", code)
    study.set_user_attr("exhausted", code)
    for number in range(NUM_TRIALS):
        study.add_trial(
            create_trial(
                params={"x": number / 20, "y": 0.5},
                distributions=SPACE,  # type: ignore[arg-type]
                value=number / 20,
                system_attrs=attributes,
                user_attrs=attributes,
            )
        )


def write_folder(tmp_path: Path, storage: str, marker: Path) -> SweepFolder:
    """Write a search with a poisoned study."""
    folder = SweepFolder(tmp_path / "theirs")
    values = [{"x": repr(number / 20), "y": "0.5"} for number in range(NUM_TRIALS)]
    status = {"status": "completed", "best": {"value": 0.5, "epoch": 1}}
    write_search(folder, [(value, status) for value in values])
    write_poisoned_study(make_storage(folder.storage_name(storage)), "theirs", marker)
    return folder


@pytest.mark.parametrize("storage", ["sqlite", "journal"])
def test_resume_search_with_pickles_in_database_runs_no_code(tmp_path: Path, storage: str) -> None:
    marker = tmp_path / "marker"
    folder = write_folder(tmp_path, storage, marker)
    search = open_search(folder, ARGUMENTS, storage=storage)
    assert search.next_job() is not None
    assert search_figures(folder)
    assert not marker.exists()
    states = [trial.state for trial in search.study.trials]
    assert states == [TrialState.COMPLETE] * NUM_TRIALS + [TrialState.RUNNING]


@pytest.mark.parametrize("storage", ["sqlite", "journal"])
def test_poisoned_database_runs_code_when_optuna_opens_it(tmp_path: Path, storage: str) -> None:
    marker = tmp_path / "marker"
    folder = write_folder(tmp_path, storage, marker)
    theirs = make_storage(folder.storage_name(storage))
    study = optuna.load_study(study_name="theirs", storage=theirs, sampler=CmaEsSampler())
    study.ask(SPACE)  # type: ignore[arg-type]
    assert marker.exists()


def test_resume_search_ignores_triggers_and_journals_of_database(tmp_path: Path) -> None:
    """A trigger could add a pickle later, and SQLite applies a journal that it finds."""
    folder = write_folder(tmp_path, "sqlite", tmp_path / "marker")
    file = folder.state_folder / "optuna.db"
    with sqlite3.connect(file) as database:
        database.execute(
            "CREATE TRIGGER t AFTER INSERT ON trials BEGIN INSERT INTO trial_system_attributes "
            "(trial_id, key, value_json) VALUES (new.trial_id, 'cma:optimizer:0', '\"80\"'); END"
        )
    file.with_name("optuna.db-journal").write_bytes(file.read_bytes())
    search = open_search(folder, ARGUMENTS)
    assert search.next_job() is not None
    assert [trial.user_attrs for trial in search.study.trials] == [{}] * (NUM_TRIALS + 1)
    with sqlite3.connect(file) as database:
        assert not database.execute("SELECT * FROM sqlite_master WHERE type='trigger'").fetchall()


@pytest.mark.parametrize("kind", ["link", "dangling", "fifo", "huge"])
@pytest.mark.parametrize(
    "name", ["optuna.db", "optuna.db-journal", "optuna.log", "optuna.log.lock"]
)
def test_resume_search_replaces_what_is_no_database(tmp_path: Path, kind: str, name: str) -> None:
    folder = SweepFolder(tmp_path / "theirs")
    write_search(folder, [({"x": "0.5", "y": "0.5"}, {"status": "running"})])
    mine, file = tmp_path / "mine.db", folder.state_folder / name
    mine.write_text("mine")
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "huge":
        file.touch()
        os.truncate(file, 2**40)
    else:
        file.symlink_to(mine if kind == "link" else tmp_path / "new.db")
    storage = "sqlite" if ".db" in name else "journal"
    assert open_search(folder, ARGUMENTS, storage=storage).next_job() is not None
    assert mine.read_text() == "mine"
    assert not (tmp_path / "new.db").exists()


def test_database_named_in_file_is_refused(tmp_path: Path) -> None:
    conf = tmp_path / "conf" / "sweep"
    conf.mkdir(parents=True)
    storage = f"sqlite:///{tmp_path}/theirs.db"
    content = {"hydra": {"sweeper": {"storage": storage}}}
    (conf / "theirs.yaml").write_text(f"# @package _global_\n{json.dumps(content)}")
    flags = ("--config-dir", str(tmp_path / "conf"))
    command = ("sweep=theirs", "hydra/sweeper=optuna", "seed=0,1")
    expected = f"hydra.sweeper.storage={storage!r}: a database can only be named on the command"
    assert expected in sweep_errors(*command, flags=flags)
    assert sweep_errors(*command, f"hydra.sweeper.storage='{storage}'", flags=flags) == ""


@pytest.mark.parametrize("storage", ["sqlite:///{}/fifo", "sqlite:///{}/no/a.db", "nosuch://a/b"])
def test_database_that_cannot_be_opened_is_one_error(tmp_path: Path, storage: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UserError, match=r"hydra\.sweeper\.storage='.*' cannot be opened: "):
        open_search(SweepFolder(tmp_path / "mine"), ARGUMENTS, storage=storage.format(tmp_path))
