"""The disk fills up, folders go, permissions are lost, two want the same folder."""

from __future__ import annotations

import ctypes
import json
import multiprocessing as mp
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import FEW, run_app
from hydra._internal.utils import get_args_parser
from processes import TESTS, assert_equal_runs, started, status_of
from torture import WORDS, assert_readable, wait_until
from warm import WarmCommand

from app.callbacks.tables import truncate_to_history
from app.cli.preflight import preflight
from app.config import resolvers
from app.runtime.errors import ConfigError, StorageError, UserError
from app.runtime.files import atomic_write, read_json, read_status, remove_temp_files, write_text
from app.runtime.lock import FolderInUse, check_unlocked, run_lock
from app.sweep.outcome import read_run_status
from app.training.checkpoint.checkpoint import write_model
from app.training.checkpoint.checksum import CheckpointInfo, write_with_checksum
from app.training.checkpoint.rotation import latest_valid

STORAGE = 74
TASK = ("task._target_=faulty.FaultyTask", "trusted_targets=[faulty]")
ENVIRONMENT = {"PYTHONPATH": TESTS, "FAULT": "none:0:0"}
RUN = (*WORDS, "hydra.run.dir=small/run", "resume=auto")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of a few megabytes."""
    folder = tmp_path / "small"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no small disk can be made here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that has a large disk."""
    cwd = tmp_path_factory.mktemp("large")
    ran = run_app(cwd, *WORDS, "hydra.run.dir=whole")
    assert ran.code == 0, ran.err
    return cwd / "whole"


@pytest.mark.parametrize("free", [0, 2_000_000])
def test_a_full_disk_is_named_and_nothing_is_lost(
    small: Path, whole: Path, tmp_path: Path, free: int
) -> None:
    """It fills up after the first state is there, so that a state or a table finds no room."""
    cut = started_on(tmp_path, small / "run" / "checkpoints" / "last.pt")
    fill(small, free)
    out, _ = cut.communicate(timeout=120)
    assert cut.returncode == STORAGE, out
    line = next(line for line in out.splitlines() if "No space left on device" in line)
    assert "small/run" in line
    assert "bytes are free" in line
    assert "Traceback" not in out
    assert_readable(small / "run")
    assert latest_valid(small / "run")[0] is not None
    (small / "filler").unlink()
    again = run_app(tmp_path, *RUN, *TASK, **ENVIRONMENT)
    assert again.code == 0, again.out + again.err
    assert_equal_runs(whole, small / "run")


@pytest.mark.parametrize("multirun", [False, True])
def test_a_disk_that_is_full_from_the_start_is_named_before_anything_is_written(
    small: Path, tmp_path: Path, multirun: bool
) -> None:
    fill(small, 100_000)
    words = ("-m", "hydra.sweep.dir=small/run") if multirun else ("hydra.run.dir=small/run",)
    ran = run_app(tmp_path, *words, *WORDS)
    assert ran.code == STORAGE
    (line,) = ran.err.splitlines()
    assert "small: the 1,048,576 bytes that any run needs cannot be written: No space" in line
    assert "bytes are free" in line
    assert [path.name for path in small.iterdir()] == ["filler"]


def started_on(cwd: Path, first: Path) -> WarmCommand:
    """A command that has just written its first state, and goes on slowly."""
    process = WarmCommand(cwd, [*RUN, *TASK], ENVIRONMENT | {"SLOW": "0.3"})
    wait_until(first)
    return process


def fill(disk: Path, free: int) -> None:
    """Leaves so many bytes."""
    left = shutil.disk_usage(disk).free - free
    (disk / "filler").write_bytes(bytes(max(0, left)))


def test_a_folder_that_is_gone_ends_it_with_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    cut = started_on(tmp_path, tmp_path / "small" / "run" / "checkpoints" / "last.pt")
    (tmp_path / "small" / "run").rename(tmp_path / "small" / "moved")
    (tmp_path / "small" / "run").write_text("no folder")
    out, _ = cut.communicate(timeout=120)
    assert cut.returncode == STORAGE, out
    assert "cannot be written: " in out
    assert "Traceback" not in out
    assert latest_valid(tmp_path / "small" / "moved")[0] is not None


def write_state(path: Path) -> None:
    """Through torch, which has an error of its own for a full disk."""
    content = {"weights": torch.ones(1_000_000)}
    seal = CheckpointInfo("state", 1, 1)
    atomic_write(
        path, lambda f: write_with_checksum(f, path.name, seal, lambda g: torch.save(content, g))
    )


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_text(path, "x" * 100_000),
        write_state,
        lambda path: write_model(path, {"weights": torch.ones(1_000_000)}),
    ],
    ids=["text", "state", "model"],
)
def test_what_is_not_written_leaves_what_was_there(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    path = tmp_path / "folder" / "a.txt"
    write_text(path, "first")
    with pytest.raises(StorageError) as refused, limited():
        write(path)
    assert str(path) in str(refused.value)
    assert "File too large" in str(refused.value)
    assert path.read_text() == "first"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


@contextmanager
def limited() -> Iterator[None]:
    """Files may not grow beyond 1000 bytes meanwhile."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    heard = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, heard)


def test_what_a_dead_writer_left_goes(tmp_path: Path) -> None:
    left = tmp_path / "checkpoints" / ".last.pt.part"
    left.parent.mkdir()
    left.write_text("half")
    (tmp_path / "checkpoints" / "mine.part").write_text("not ours")
    other = tmp_path / "other" / ".status.json.part"  # of a run inside, which may be under way
    other.parent.mkdir()
    other.touch()
    (other.parent / "status.json").write_text("{}")
    remove_temp_files(tmp_path)
    assert [path.name for path in left.parent.iterdir()] == ["mine.part"]
    assert other.exists()


def test_a_damaged_status_is_one_clear_error(tmp_path: Path) -> None:
    for content in ("{", "[]", "[" * 100_000, '{"status": 3}'):
        (tmp_path / "status.json").write_text(content)
        with pytest.raises(UserError, match=r"status\.json is damaged"):
            read_run_status(tmp_path)


# ---- what is not this user's to read or to change

CAPSET = 0x20080522  # the version of the kernel's structures
BEYOND = 0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH: root's way past all permissions


@contextmanager
def mode(path: Path, bits: int) -> Iterator[None]:
    """The permissions of a file meanwhile, which count for root, too."""
    if sys.platform != "linux":
        pytest.skip("root's rights can be given up on Linux alone")
    libc, before = ctypes.CDLL(None), path.stat().st_mode
    thread, sets = (ctypes.c_uint32 * 2)(CAPSET, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(thread, sets) == 0
    all_of_them = sets[0]
    path.chmod(bits)
    try:
        sets[0] = all_of_them & ~BEYOND
        assert libc.capset(thread, sets) == 0
        yield
    finally:
        sets[0] = all_of_them
        assert libc.capset(thread, sets) == 0
        path.chmod(before)


def refused(*words: str) -> UserError:
    """What the program says before it starts anything."""
    resolvers.register()
    with pytest.raises(UserError) as error:
        preflight(get_args_parser().parse_args(["model=mlp", *words]))
    return error.value


@pytest.mark.parametrize(("name", "bits"), [("", 0), ("checkpoints", 0), ("checkpoints", 0o400)])
@pytest.mark.parametrize(
    "words", ["resume=auto hydra.run.dir=run", "resume=run", "mode=test ckpt=run"]
)
def test_a_run_folder_that_cannot_be_read(
    elsewhere: Path, name: str, bits: int, words: str
) -> None:
    (elsewhere / "run" / "checkpoints").mkdir(parents=True)
    (elsewhere / "run" / "checkpoints" / "last.pt").touch()
    with mode(elsewhere / "run" / name, bits):
        told = str(refused(*words.split()))
    assert str(elsewhere / "run" / name) in told
    assert told.endswith("cannot be read: Permission denied")


@pytest.mark.parametrize("name", ["", ".hydra", "epoch_details"])
def test_a_new_run_in_a_folder_that_cannot_be_read(elsewhere: Path, name: str) -> None:
    (elsewhere / "run" / name).mkdir(parents=True)
    with mode(elsewhere / "run" / name, 0):
        told = str(refused("hydra.run.dir=run"))
    assert told.endswith("cannot be read: Permission denied")


@pytest.mark.parametrize("name", ["run.log", "sweep.log", ".hydra/config.yaml"])
def test_a_file_that_others_would_fail_to_open(elsewhere: Path, name: str) -> None:
    file = elsewhere / "run" / name
    file.parent.mkdir(parents=True)
    file.touch()
    with mode(file, 0o444):
        error = refused("hydra.run.dir=run")
    assert str(error) == f"{file} cannot be written: Permission denied"
    assert isinstance(error, StorageError)
    file.unlink()
    file.mkdir()
    assert str(refused("hydra.run.dir=run")) == f"{file} cannot be written: Is a directory"


def test_a_status_that_cannot_be_read(elsewhere: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = elsewhere / "run" / "status.json"
    write_text(file, "{}")
    with mode(file, 0):
        with pytest.raises(UserError, match=r"status\.json cannot be read: Permission denied"):
            read_json(file)
        assert read_status(file.parent) == {}
    assert "it is written anew" in caplog.text
    file.unlink()
    file.mkdir()
    with pytest.raises(UserError, match=r"status\.json cannot be read: Is a directory"):
        read_json(file)
    error = refused("hydra.run.dir=run", "resume=auto")
    assert isinstance(error, ConfigError)
    assert "status.json is a folder" in str(error)


def test_tables_that_cannot_be_removed(tmp_path: Path) -> None:
    table = tmp_path / "epoch_details" / "epoch001_train.csv"
    write_text(table, "a\n1\n")
    with mode(table.parent, 0o555), pytest.raises(StorageError, match=r"csv cannot be written"):
        truncate_to_history(tmp_path, ())
    (table.parent / ".a.csv.part").touch()
    with mode(table.parent, 0o555), pytest.raises(StorageError, match=r"part cannot be written"):
        remove_temp_files(tmp_path)


# ---- one owner


def test_a_folder_has_one_owner(tmp_path: Path) -> None:
    context = mp.get_context("fork")
    holds, lets_go = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path, holds, lets_go))
    process.start()
    assert holds.wait(30)
    with pytest.raises(FolderInUse, match=rf"is in use.*process {process.pid}"):
        check_unlocked(tmp_path)
    with pytest.raises(FolderInUse), run_lock(tmp_path):
        pass
    process.kill()
    process.join()
    check_unlocked(tmp_path)  # a dead owner has none
    with run_lock(tmp_path):
        assert json.loads((tmp_path / ".owner.json").read_text())["process"] == os.getpid()


def _hold(folder: Path, holds: object, lets_go: object) -> None:
    with run_lock(folder):
        holds.set()  # type: ignore[attr-defined]
        lets_go.wait(60)  # type: ignore[attr-defined]


def test_a_second_resumer_is_refused(tmp_path: Path) -> None:
    """By its command, before anything is touched; the first ends as if nothing had been."""
    process = started(tmp_path, fault="slow:0:1")
    folder = tmp_path / "run"
    before = (folder / "config.yaml").stat().st_mtime_ns
    second = run_app(tmp_path, "model=mlp", "resume=auto", "hydra.run.dir=run")
    assert second.code == 2
    assert "is in use: a run goes on there" in second.err
    assert f"process {process.pid}" in second.err
    assert "Traceback" not in second.err
    assert (folder / "config.yaml").stat().st_mtime_ns == before
    assert status_of(folder)["status"] == "running"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    check_unlocked(folder)


@pytest.mark.parametrize("count", [4, pytest.param(32, marks=pytest.mark.long)])
def test_so_many_commands_at_once_have_as_many_folders(tmp_path: Path, count: int) -> None:
    words = ("model=mlp", "trainer.fast_dev_run=true", "~callbacks.plots")
    running = [WarmCommand(tmp_path, words, {"OMP_NUM_THREADS": "1"}) for _ in range(count)]
    told = [one.communicate(250)[0] for one in running]
    assert [one.returncode for one in running] == [0] * count, told
    statuses = [json.loads(p.read_text()) for p in tmp_path.glob("outputs/*/*/status.json")]
    assert [status["status"] for status in statuses] == ["completed"] * count


@pytest.mark.parametrize("name", [".lock", "run.log", "checkpoints", "epoch_details/a.csv"])
def test_a_link_in_a_run_folder_is_refused(tmp_path: Path, name: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = tmp_path / "run"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).symlink_to(victim)
    for look in (check_unlocked, lambda folder: run_lock(folder).__enter__()):
        with pytest.raises(UserError, match="is a link"):
            look(folder)
    assert victim.read_text() == "mine"


def test_a_lock_that_is_none_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(FolderInUse, match="cannot be locked"):
        check_unlocked(tmp_path)


# ---- saving in the background


def test_a_signal_with_a_save_in_flight_leaves_it_whole(tmp_path: Path) -> None:
    words = ("model.hidden=[3000,3000]", "checkpoint.asynchronous=true", "trainer.max_epochs=100")
    process = WarmCommand(tmp_path, [*WORDS, *words, "hydra.run.dir=run"], {"OMP_NUM_THREADS": "1"})
    wait_until(tmp_path / "run" / "checkpoints" / ".last.pt.part")
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143, out
    assert_readable(tmp_path / "run")
    state, problems = latest_valid(tmp_path / "run")
    assert state == tmp_path / "run" / "checkpoints" / "last.pt"
    assert not problems
    training = torch.load(state, weights_only=True)["training"]
    assert training["under_way"] is not None or training["is_over"]
    assert not [*(tmp_path / "run").rglob("*.part")]


def test_the_end_waits_for_what_is_in_flight(tmp_path: Path) -> None:
    ran = run_app(
        tmp_path,
        *("model=mlp", "model.hidden=[2000,2000]", "trainer.max_epochs=1", *FEW),
        *("trainer.limit_test_batches=2", "checkpoint.asynchronous=true", "hydra.run.dir=run"),
    )
    assert ran.code == 0, ran.err
    assert_readable(tmp_path / "run")
    assert latest_valid(tmp_path / "run") == (tmp_path / "run" / "checkpoints" / "last.pt", [])
