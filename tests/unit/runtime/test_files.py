"""The disk fills up, folders go, permissions are lost, two want the same folder."""

from __future__ import annotations

import ctypes
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hydra._internal.utils import get_args_parser

from app.callbacks.tables import truncate_to_history
from app.cli.preflight import preflight
from app.config import resolvers
from app.runtime.errors import ConfigError, StorageError, UserError
from app.runtime.files import atomic_write, read_json, read_status, remove_temp_files, write_text
from app.runtime.lock import FolderInUse, check_unlocked, run_lock
from app.sweep.outcome import read_run_status
from app.training.checkpoint.checkpoint import write_model
from app.training.checkpoint.checksum import CheckpointInfo, write_with_checksum


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
