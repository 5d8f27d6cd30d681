"""What made a run: its record, and the differences of two records."""

from __future__ import annotations

import copy
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from app.data.identity import DataIdentity
from app.experiment import environment
from app.experiment.environment import (
    Environment,
    describe_code,
    iter_differences,
    read_attempts,
    redact_argument,
)
from tests.support.runs import job_for
from tests.unit.runtime.test_git import run_git

DATA = {"train": DataIdentity(3, "abc", "the arrays")}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def installed_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let the program be installed as a package, so that its own checkout does not matter."""
    monkeypatch.setattr(environment, "PROGRAM_FOLDER", tmp_path / "site-packages")


@pytest.fixture
def code(tmp_cwd: Path) -> Path:
    """A repository with a commit and a later change, which is the working directory."""
    run_git(tmp_cwd, "init")
    (tmp_cwd / "model.py").write_text("width = 1\n")
    run_git(tmp_cwd, "add", ".")
    run_git(tmp_cwd, "commit", "-m", "first")
    (tmp_cwd / "model.py").write_text("width = 2\n")
    return tmp_cwd


def write(folder: Path, *overrides: str) -> dict[str, Any]:
    job = job_for("model=mlp", *overrides)
    return Environment(job, CPU).write(folder, job.plain["data"]["source"], DATA)


def test_environment_record_says_what_made_the_run(code: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    record = write(folder, "seed=3")
    assert json.loads((folder / "environment.json").read_text()) == {"attempts": [record]}
    assert record["overrides"] == ["model=mlp", "seed=3"]
    assert record["packages"]["torch"] == version("torch")
    assert record["packages"]["hydra-core"] == version("hydra-core")
    assert record["cpu"]["threads"] == torch.get_num_threads()
    assert record["data"]["stages"]["train"]["samples"] == 3
    assert record["data"]["source"]["train"]["_target_"] == "app.data.mnist.mnist"
    entry = record["code"]["working_folder"]
    assert (entry["folder"], entry["branch"], entry["is_dirty"]) == (str(code), "main", True)
    assert "+width = 2" in (folder / entry["patch"]).read_text()
    assert f"{code}: commit {entry['commit'][:10]} (branch main)" in describe_code(record)


def test_environment_of_resumed_run_keeps_the_first(code: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    patches = []
    for text in ("width = 2\n", "width = 2\n", "width = 3\n"):
        (code / "model.py").write_text(text)
        patches.append(write(folder)["code"]["working_folder"]["patch"])
    assert patches == ["uncommitted.patch", "uncommitted.patch", "uncommitted-2.patch"]
    assert len(read_attempts(folder)) == 3
    assert "+width = 2" in (folder / "uncommitted.patch").read_text()


def test_environment_many_attempts_keep_first_and_newest(
    tmp_cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "MAX_ATTEMPTS", 3)
    for number in range(5):
        write(tmp_cwd, f"seed={number}")
    seeds = [attempt["overrides"][-1] for attempt in read_attempts(tmp_cwd)]
    assert seeds == ["seed=0", "seed=3", "seed=4"]


def test_environment_outside_of_a_repository_says_so(tmp_cwd: Path) -> None:
    record = write(tmp_cwd)
    assert record["code"]["working_folder"] == {"commit": None, "note": "not in a git repository"}
    assert "working folder: not in a git repository" in describe_code(record)
    assert not list(tmp_cwd.glob("*.patch"))


@pytest.mark.usefixtures("code")
def test_environment_patch_is_not_written_through_a_link(tmp_path: Path) -> None:
    folder, target = tmp_path / "run", tmp_path / "target"
    folder.mkdir()
    (folder / "uncommitted.patch").symlink_to(target)
    assert write(folder)["code"]["working_folder"]["patch"] == "uncommitted-2.patch"
    assert not target.exists()


@pytest.mark.parametrize("content", ["[]", "{", '{"attempts": [1]}', '{"attempts": {}}'])
def test_read_attempts_damaged_file_is_reported_and_replaced(
    tmp_cwd: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_cwd / "environment.json").write_text(content)
    write(tmp_cwd)
    assert "is damaged" in caplog.text
    assert len(read_attempts(tmp_cwd)) == 1


def test_environment_contains_no_secret(
    code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret, typed = "s3cr3t-of-the-environment", "typed-in-the-shell"
    monkeypatch.setenv("MY_TOKEN", secret)
    monkeypatch.setattr("sys.argv", ["app", f"notes={secret}", f"+a.api_key={typed}"])
    (code / "model.py").write_text(f"token = {secret!r}\n")
    folder = tmp_path / "run"
    record = write(folder, f"notes={secret}", "name=x")
    files = [path for path in folder.iterdir() if path.is_file()]
    assert {path.name for path in files} == {"environment.json", "uncommitted.patch"}
    for path in files:
        text = path.read_text()
        assert secret not in text
        assert typed not in text
    assert record["command"] == "app 'notes=${oc.env:MY_TOKEN}' '+a.api_key=<redacted>'"


@pytest.mark.parametrize(
    "kept", ["optimizer.lr=0.1", "-m", "+a.token=${oc.env:MY_TOKEN}", "a.token=", "model=mlp"]
)
def test_redact_argument_keeps_what_is_no_secret(kept: str) -> None:
    assert redact_argument(kept) == kept


@pytest.mark.usefixtures("code")
@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        (("packages", "torch"), "1.0", "package torch: 1.0 before"),
        (("python",), "3.0", "python: 3.0 before"),
        (("cpu", "threads"), 99, "number of threads: 99 before"),
        (("device",), "cuda (X)", "device: cuda (X) before, cpu now"),
        (("ranks",), 7, "number of ranks: 7 before, 1 now"),
        (("code", "working_folder", "commit"), "0" * 40, "commit of the working folder: 000"),
        (
            ("code", "working_folder", "patch_sha256"),
            None,
            "uncommitted changes of the working folder: none before",
        ),
        (("data", "stages", "train", "samples"), 4, "number of train samples: 4 before, 3 now"),
        (("data", "stages", "train", "hash"), "b", "hash of the train data: b before, abc now"),
    ],
)
def test_iter_differences_finds_each_part(
    tmp_path: Path, path: tuple[str, ...], value: object, line: str
) -> None:
    record = write(tmp_path / "run")
    other = copy.deepcopy(record)
    node = other
    for name in path[:-1]:
        node = node[name]
    node[path[-1]] = value
    (found,) = iter_differences(other, record)
    assert found.startswith(line)


def test_iter_differences_equal_or_malformed_records_have_none(tmp_cwd: Path) -> None:
    record = write(tmp_cwd)
    assert not list(iter_differences(record, json.loads(json.dumps(record))))
    malformed = {"packages": [1], "code": {"a": 3}, "data": 4, "cpu": "x"}
    assert not list(iter_differences(malformed, record))
