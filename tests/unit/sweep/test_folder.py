"""The folder of a sweep."""

from __future__ import annotations

import json
import os
from pathlib import Path

import optuna
import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra.core.plugins import Plugins
from hydra.types import RunMode

from app.runtime.errors import UserError
from app.runtime.files import write_json
from app.sweep.folder import SweepFolder
from app.sweep.outcome import read_run_status
from app.training.pruning import make_storage


def test_frozen_loader_after_edit_reads_original_files(tmp_path: Path) -> None:
    Plugins.instance()  # registers Hydra's config sources
    conf = tmp_path / "conf"
    conf.mkdir()
    (conf / "config.yaml").write_text("a: 1\n")
    os.mkfifo(conf / "fifo.yaml")
    (conf / "large.yaml").write_text(" " * 1_000_001)
    (conf / "zero.yml").symlink_to("/dev/zero")
    search_path = ConfigSearchPathImpl()
    search_path.append("hydra", "pkg://hydra.conf")
    search_path.append("main", f"file://{conf}")
    search_path.append("schema", "structured://")
    loader = ConfigLoaderImpl(search_path)
    folder = SweepFolder(tmp_path / "sweep")
    folder.freeze(loader)
    copied = folder.state_folder / "conf" / "main"
    assert [path.name for path in copied.iterdir()] == ["config.yaml"]
    (conf / "config.yaml").write_text("a: 2\n")
    frozen = folder.frozen_loader(loader)
    (copied / "link.yaml").symlink_to(conf / "config.yaml")
    with pytest.raises(UserError, match=r"link\.yaml is a symbolic link; allowed: a regular file"):
        folder.frozen_loader(loader)
    assert frozen.load_configuration("config", [], RunMode.RUN).a == 1
    assert loader.load_configuration("config", [], RunMode.RUN).a == 2


def test_sweep_folder_of_newer_format_is_refused(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    folder.save()
    file = tmp_path / ".sweep" / "sweep.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 3}))
    with pytest.raises(UserError, match="has format 3, but this version of the program reads"):
        SweepFolder(tmp_path)


def test_sweep_folder_job_is_running_while_locked(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    with folder.job_locked(tmp_path / "job"):
        assert folder.is_running(tmp_path / "job")
    assert not folder.is_running(tmp_path / "job")


def test_sweep_folder_stop_keeps_request_to_running_jobs(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    folder.stop()
    assert (folder.is_stopped, folder.stops_running_jobs) == (True, False)
    folder.stop(running_jobs=True)
    folder.stop()
    assert folder.stops_running_jobs
    folder.clear_stop()
    assert not folder.is_stopped


@pytest.mark.parametrize("name", ["plain", "what?", "100%", "a#b c", "é?é"])
def test_storage_name_leads_to_a_database_in_the_folder(tmp_path: Path, name: str) -> None:
    folder = SweepFolder(tmp_path / name)
    folder.state_folder.mkdir(parents=True)
    optuna.create_study(storage=make_storage(folder.storage_name("sqlite")))
    assert [path.name for path in folder.state_folder.iterdir()] == ["optuna.db"]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_find_job_of_added_and_of_saved_jobs(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    for number in range(3):
        folder.add({"seed": str(number)})
    folder.add({"seed": "9"}, 9)
    folder.save()
    for found in (folder, SweepFolder(tmp_path)):
        assert [job.number for job in found.jobs] == [0, 1, 2, 9]
        assert found.find_job({"seed": "2"}) is found.jobs[2]
        assert found.find_job({"seed": "3"}) is None
        assert found.add({"seed": "3"}).number == 10


def test_read_run_status_sees_each_new_status(tmp_path: Path) -> None:
    assert read_run_status(tmp_path).status == "pending"
    for status in ("running", "stopped", "running"):  # of the same size
        write_json(tmp_path / "status.json", {"status": status})
        assert read_run_status(tmp_path).status == status
    (tmp_path / "status.json").unlink()
    assert read_run_status(tmp_path).status == "pending"
