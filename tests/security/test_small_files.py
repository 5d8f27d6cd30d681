"""Hostile small files in run and sweep folders: one line each, and the rest is reported."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from app.cli.report import report
from app.config.yaml_files import read_similar_yaml, read_yaml
from app.runtime.errors import UserError
from app.runtime.files import write_text
from app.runtime.lock import refuse_special_files
from app.runtime.small_files import read_csv, read_json, read_small_file
from app.sweep.folder import SweepFolder
from app.sweep.outcome import read_history, read_run_status
from tests.support.runs import RunResult, run_app

MEMORY_LIMIT = 200 * 2**20
STATUS = {
    "status": "completed",
    "seconds": 2.5,
    "goal": {"metric": "accuracy", "mode": "max"},
    "best": {"value": 0.5, "epoch": 1},
    "metrics": {"valid": {"epoch": 1, "stage": "valid", "accuracy": 0.5}, "test": {"loss": 1}},
}
SWEEP = {
    "format": 1,
    "words": ["seed=1,2"],
    "study": None,
    "jobs": [{"number": 0, "values": {"seed": "1"}, "words": ["seed=1"], "folder": "0_a"}],
}
RUN_FILES = {
    "status.json": json.dumps(STATUS),
    "config.yaml": "seed: 1\n",
    ".hydra/overrides.yaml": "- seed=1\n",
    ".hydra/hydra.yaml": "hydra: {runtime: {choices: {model: mlp}}}\n",
    "summary_table.csv": "epoch,stage,accuracy\n1,train,0.5\n1,valid,0.5\n",
}
ALIASES = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
)
TEXTS: dict[str, bytes] = {  # damaged whatever the format
    "not_utf8": b"\xff\xfe{}",
    "deep": b"[" * 100_000,
    "long_rows": b"epoch,stage\n1,train\n" + b"1," * 400_000,
    "aliases": ALIASES.encode(),
    "long_number": b"a: 1" + b":1" * 400_000,
    "date": b"a: 2001-02-31",
    "python": b"!!python/object/apply:os.system [touch was_here]",
    "wrong_type": b'"text"',
    "nul": b"\0" * 1000,
}
READERS: list[Callable[[Path, str], Any]] = [
    read_json,
    lambda folder, name: read_yaml(folder, name, dict),
    lambda folder, name: read_yaml(folder, name, list),
    read_similar_yaml,
    read_csv,
]


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        # The path of a socket is short.
        previous = Path.cwd()
        os.chdir(path.parent)
        server.bind(path.name)
        os.chdir(previous)


def link_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def link_out(path: Path) -> None:
    """Link to a file with valid content, one folder above the one that is reported."""
    outside = path.parents[3] / f"outside_{path.name}"
    outside.write_text(RUN_FILES.get(path.name, RUN_FILES.get(f".hydra/{path.name}", "{}")))
    path.symlink_to(outside)


def make_sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(6 * 2**30)


Make = Callable[[Path], object]
SPECIAL_FILES: dict[str, tuple[Make, str]] = {
    "fifo": (make_fifo, "is a FIFO; allowed: a regular file"),
    "socket": (make_socket, "is a socket; allowed: a regular file"),
    "device": (link_device, "is a link out of the folder, to /dev/zero"),
    "link_out": (link_out, "is a link out of the folder, to "),
    "folder": (Path.mkdir, "is a folder; allowed: a regular file"),
    "sparse": (make_sparse, "has 6,442,450,944 bytes; allowed: 1"),
}


@contextmanager
def limited_memory() -> Iterator[None]:
    """Let the memory of this process grow by no more than a limit."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    previous = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + MEMORY_LIMIT
    resource.setrlimit(resource.RLIMIT_AS, (limit, previous[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, previous)


@pytest.mark.parametrize("kind", SPECIAL_FILES)
def test_readers_of_special_file_name_what_it_is(kind: str, tmp_path: Path) -> None:
    make, message = SPECIAL_FILES[kind]
    path = tmp_path / "a" / "b" / "c" / "file"
    path.parent.mkdir(parents=True)
    make(path)
    for read in READERS:
        with limited_memory(), pytest.raises(UserError) as caught:
            read(path.parent, "file")
        assert str(caught.value).startswith(f"{path} {message}")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", TEXTS)
def test_readers_of_damaged_text_fail_with_one_line(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(TEXTS[kind])
    for read in READERS:
        with limited_memory():
            try:
                read(tmp_path, "file")
            except UserError as error:
                assert str(error).startswith(f"{path} is damaged: ")
                assert "\n" not in str(error)
                continue
        assert read is read_csv  # any text is the header of some table
    assert not Path("was_here").exists()


def test_readers_of_empty_or_missing_file_return_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert read_yaml(tmp_path, "empty", dict) == read_yaml(tmp_path, "missing", dict) == {}
    assert read_csv(tmp_path, "empty") == read_csv(tmp_path, "missing") == []
    assert read_similar_yaml(tmp_path, "empty") == read_similar_yaml(tmp_path, "missing") == {}
    assert read_json(tmp_path, "missing/file") == {}
    with pytest.raises(UserError, match="is damaged: it is not JSON"):
        read_json(tmp_path, "empty")


def test_readers_follow_links_inside_the_folder(tmp_path: Path) -> None:
    (tmp_path / "run" / "logs").mkdir(parents=True)
    write_text(tmp_path / "run" / "logs" / "real.json", '{"a": 1}')
    (tmp_path / "run" / "status.json").symlink_to("logs/real.json")
    (tmp_path / "linked_run").symlink_to("run")
    assert read_json(tmp_path / "linked_run", "status.json") == {"a": 1}
    (tmp_path / "run" / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="loop cannot be read: Too many levels of symbolic links"):
        read_json(tmp_path / "run", "loop")


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": 1e999}', '{"a": 1' + "0" * 30 + "}", "[1]"])
def test_read_json_values_no_file_of_ours_has_are_refused(text: str, tmp_path: Path) -> None:
    write_text(tmp_path / "status.json", text)
    with pytest.raises(UserError, match=r"status\.json is damaged: it contains "):
        read_json(tmp_path, "status.json")


def test_read_small_file_that_grows_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size is not believed: a file may grow while it is read."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    real_open = os.open

    def grow(*arguments: Any, **options: Any) -> int:
        path.write_bytes(b"x" * 10_000_000)
        return real_open(*arguments, **options)

    monkeypatch.setattr(os, "open", grow)
    with pytest.raises(UserError, match="has 10,000,000 bytes; allowed: 1,000"):
        read_small_file(tmp_path, "file", 1_000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"status": 3}, "status=3 is not valid; allowed: a string"),
        ({"best": [1]}, "best="),
        ({"best": {"value": "0.5", "epoch": 1}}, "best.value='0.5' is not valid"),
        ({"goal": {"metric": "accuracy", "mode": "up"}}, "allowed: max, min"),
        ({"metrics": {"test": [1]}}, "metrics.test"),
        ({"metrics": {"test": {"loss": {}}}}, "metrics.test.loss"),
        ({"seconds": "1"}, "seconds='1'"),
        ({"error": ["a"]}, "error=['a']"),
    ],
)
def test_read_run_status_wrong_type_is_named(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_text(tmp_path / "status.json", json.dumps(STATUS | change))
    with pytest.raises(UserError) as caught:
        read_run_status(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"jobs": {}}, "jobs={} is not valid"),
        ({"jobs": [3]}, "jobs.0"),
        ({"words": "seed=1"}, "words='seed=1' is not valid"),
        ({"format": "1"}, "format='1' is not valid"),
        ({"words": ["seed=" + "1" * 20_000] * 2}, "overrides of more than 30,000 characters"),
        ({"jobs": [SWEEP["jobs"][0] | {"values": {"seed": 1}}]}, "jobs.0.values.seed=1"),  # type: ignore[index]
        ({"jobs": [SWEEP["jobs"][0] | {"folder": "../a"}]}, "'../a' is not the name of a job"),  # type: ignore[index]
        ({"jobs": [SWEEP["jobs"][0] | {"folder": "link"}]}, "link is a symbolic link"),  # type: ignore[index]
    ],
)
def test_sweep_folder_wrong_type_is_named(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to("..")
    write_text(tmp_path / ".sweep" / "sweep.json", json.dumps(SWEEP | change))
    with pytest.raises(UserError) as caught:
        SweepFolder(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch,stage,loss\n1,train,many\n", "there is text in the column 'loss'"),
        ("epoch,loss\n1,1\n", "there is no column 'stage'"),
        ("a,b\n1,1,1\n", "its rows have from 2 to 3 values"),
        (",".join(["a"] * 2_001), "it has more than 2,000 columns"),
        ("a\n" * 600_000, "it contains more than 500,000 values"),
        ('epoch,stage\n1,"train\n', "unexpected end of data"),
    ],
)
def test_read_history_damaged_table_is_described(text: str, message: str, tmp_path: Path) -> None:
    write_text(tmp_path / "summary_table.csv", text)
    with limited_memory(), pytest.raises(UserError, match=message):
        read_history(tmp_path)


# ---- reports


def make_run(folder: Path, name: str = "", make: Make | None = None) -> None:
    """Write the files of a finished run, one of them with another function."""
    for file, content in RUN_FILES.items():
        write_text(folder / file, content)
    if make is not None:
        (folder / name).unlink()
        make(folder / name)


def hostile_runs(folder: Path) -> list[Path]:
    """Write a run for each hostile content of each small file, and return those files."""
    kinds: dict[str, Make] = {name: make for name, (make, _) in SPECIAL_FILES.items()}
    kinds |= {kind: partial(Path.write_bytes, data=text) for kind, text in TEXTS.items()}
    files = []
    for kind, make in kinds.items():
        for name in RUN_FILES:
            run = folder / "bad" / f"{kind}_{Path(name).stem}"
            make_run(run, name, make)
            files.append(run / name)
    return files


def test_report_lists_good_runs_and_one_line_for_each_bad_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Only this run sets these keys on the command line, so those of the others are looked up.
    overrides = "[seed=1, model=mlp, trainer.max_epochs=3]"
    make_run(tmp_path / "good", ".hydra/overrides.yaml", partial(Path.write_text, data=overrides))
    files = hostile_runs(tmp_path)
    with caplog.at_level(logging.WARNING):
        report([tmp_path], tmp_path / "report")
    table = pd.read_csv(tmp_path / "report" / "sweep.csv").set_index("folder")
    assert len(table) == 1 + len(files)
    good = table.loc["../good"]
    assert (good["status"], good["best_accuracy"]) == ("completed", 0.5)
    lines = [record.getMessage() for record in caplog.records]
    reported = [file for file in files if sum(str(file) in line for line in lines) == 1]
    unreported = [file for file in files if file not in reported]
    # Any line of text is the header of a table without rows.
    assert all(file.suffix == ".csv" and b"\n" not in file.read_bytes() for file in unreported)
    assert not any("\n" in line for line in lines)
    damaged = table[table["status"] == "damaged"]
    assert len(damaged) == len(files) / len(RUN_FILES)
    assert damaged["error"].notna().all()


def test_report_of_file_name_in_another_encoding_shows_it_escaped(tmp_path: Path) -> None:
    make_run(tmp_path / "a\udcff")
    report([tmp_path], tmp_path / "report")
    table = pd.read_csv(tmp_path / "report" / "sweep.csv")
    assert table["folder"].tolist() == [r"../a\udcff"]


def test_report_damaged_sweep_is_one_line_and_the_rest_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_run(tmp_path / "good")
    for kind, (make, _) in SPECIAL_FILES.items():
        path = tmp_path / "sweeps" / f"sweep_{kind}" / ".sweep" / "sweep.json"
        path.parent.mkdir(parents=True)
        make(path)
    sweep = tmp_path / "sweeps" / "mine"
    write_text(sweep / ".sweep" / "sweep.json", json.dumps(SWEEP))
    make_run(sweep / "0_a", "status.json", make_fifo)
    with caplog.at_level(logging.WARNING):
        report([tmp_path], tmp_path / "report")
    table = pd.read_csv(tmp_path / "report" / "sweep.csv")
    assert table["status"].tolist() == ["completed", "damaged"]
    assert len(caplog.records) == 1 + len(SPECIAL_FILES)


def test_report_does_not_follow_links_to_folders(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_run(tmp_path / "runs" / "good")
    (tmp_path / "runs" / "loop").symlink_to(".")
    deep = tmp_path / "runs" / "deep"
    for _ in range(500):  # deeper than a recursive search could follow
        deep = deep / "d"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "runs")
        for part in deep.relative_to(Path.cwd()).parts:
            Path(part).mkdir()
            os.chdir(part)
    report([tmp_path / "runs"], tmp_path / "report")
    assert len(pd.read_csv(tmp_path / "report" / "sweep.csv")) == 1
    assert "loop is a link, which is not followed" in caplog.text
    shutil.rmtree(tmp_path / "runs")


def test_report_never_writes_through_links(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "good")
    victim = tmp_path / "victim"
    write_text(victim, "precious")
    for name in (".sweep.csv.part", ".sweep.html.part", "sweep.csv"):
        (tmp_path / "runs" / name).symlink_to(victim)
    report([tmp_path / "runs"])
    assert victim.read_text() == "precious"
    assert (tmp_path / "runs" / "sweep.csv").read_text().startswith("job,")
    shutil.rmtree(tmp_path / "runs" / "plots")
    (tmp_path / "runs" / "plots").symlink_to(tmp_path)
    with pytest.raises(UserError, match="plots is a link"):
        report([tmp_path / "runs"])


def test_report_of_many_keys_shows_the_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_run(tmp_path / "good")
    overrides = json.dumps([f"+key{'x' * 300}{number}={number}" for number in range(1_000)])
    make_run(tmp_path / "bad", ".hydra/overrides.yaml", partial(Path.write_text, data=overrides))
    metrics = {"test": {f"metric{number}": 1 for number in range(20_000)}}
    write_text(tmp_path / "bad" / "status.json", json.dumps(STATUS | {"metrics": metrics}))
    report([tmp_path], tmp_path / "report")
    assert len(pd.read_csv(tmp_path / "report" / "sweep.csv").columns) < 1_000
    assert "only the first 200 overrides are read" in caplog.text
    assert "only the first 100 of 20" in caplog.text
    assert len(list((tmp_path / "report" / "plots").iterdir())) <= 21


# ---- commands


def test_commands_on_hostile_folders_end_with_one_line(
    tmp_path: Path, trained_run: RunResult
) -> None:
    run, sweep = tmp_path / "run", tmp_path / "sweep"
    shutil.copytree(trained_run.folder, run)
    (run / "status.json").unlink()
    make_fifo(run / "status.json")
    fifo = tmp_path / "fifo.safetensors"
    make_fifo(fifo)
    (sweep / ".sweep").mkdir(parents=True)
    make_fifo(sweep / ".sweep" / "sweep.json")

    def last_line(*arguments: str) -> str:
        result: RunResult = run_app(tmp_path, *arguments)
        assert result.code == 2, result.err
        assert "Traceback" not in result.err
        return result.err.splitlines()[-1]

    assert f"{run / 'status.json'} is a FIFO" in last_line(f"resume={run}")
    assert str(fifo) in last_line("mode=test", f"ckpt={fifo}")
    refused = last_line("-m", f"sweep.resume={sweep}")
    assert refused == f"{sweep / '.sweep' / 'sweep.json'} is a FIFO; allowed: a regular file"
    result = run_app(tmp_path, "report", str(run), str(sweep))
    assert result.code == 0
    assert f"{run / 'status.json'} is a FIFO; allowed: a regular file" in result.out


def test_refuse_special_files_of_another_kind_are_named(tmp_path: Path) -> None:
    (tmp_path / ".sweep").mkdir()
    make_fifo(tmp_path / ".sweep" / "base.yaml")
    with pytest.raises(UserError, match=r"base\.yaml is a FIFO"):
        SweepFolder(tmp_path).differences({})
    (tmp_path / ".sweep" / "base.yaml").unlink()
    for folder, make in ((tmp_path, make_fifo), (tmp_path / ".hydra", make_socket)):
        folder.mkdir(exist_ok=True)
        make(folder / "run.log")
        with pytest.raises(UserError, match=r"run\.log is a (FIFO|socket), which runs do not"):
            refuse_special_files(tmp_path)
        (folder / "run.log").unlink()
