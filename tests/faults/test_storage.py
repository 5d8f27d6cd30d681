"""Full disks, removed folders, locked folders and checkpoints written in the background."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.runtime.lock import FolderInUseError, check_unlocked, run_lock
from app.training.checkpoint.rotation import latest_valid
from app.training.checkpoint.store import read_store
from tests.support.image_files import write_image_folder
from tests.support.killed_runs import STATEFUL_RUN, assert_readable, wait_for_file
from tests.support.processes import (
    FAULTY_TASK,
    SUPPORT_DIR,
    assert_equal_runs,
    start_training,
    status_of,
)
from tests.support.runs import FEW_BATCHES, run_app
from tests.support.warm import WarmCommand

STORAGE_EXIT_CODE = 74
# The results of some processors depend on the number of threads.
ENVIRONMENT = {"PYTHONPATH": SUPPORT_DIR, "FAULT": "none:0:0", "OMP_NUM_THREADS": "1"}
RUN = (*STATEFUL_RUN, "hydra.run.dir=small/run", "resume=auto")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 24 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    mount = subprocess.run(command, capture_output=True, text=True, check=False)
    if mount.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def reference_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of the same training on a large disk."""
    cwd = tmp_path_factory.mktemp("reference")
    result = run_app(cwd, *STATEFUL_RUN, "hydra.run.dir=reference", OMP_NUM_THREADS="1")
    assert result.code == 0, result.err
    return cwd / "reference"


@pytest.mark.parametrize("free", [0, 2_000_000])
def test_full_disk_is_reported_and_run_resumes(
    small_disk: Path, reference_run: Path, tmp_path: Path, free: int
) -> None:
    """Fill the disk after the first checkpoint, so that the next file cannot be written."""
    failed = start_and_wait_for_file(
        tmp_path, small_disk / "run" / "checkpoints" / "last.safetensors"
    )
    fill_disk(small_disk, free)
    out, _ = failed.communicate(timeout=120)
    assert failed.returncode == STORAGE_EXIT_CODE, out
    line = next(line for line in out.splitlines() if "No space left on device" in line)
    assert "small/run" in line
    assert "bytes are free" in line
    assert "Traceback" not in out
    assert_readable(small_disk / "run")
    assert latest_valid(small_disk / "run")[0] is not None
    (small_disk / "filler").unlink()
    resumed = run_app(tmp_path, *RUN, *FAULTY_TASK, **ENVIRONMENT)
    assert resumed.code == 0, resumed.out + resumed.err
    assert_equal_runs(reference_run, small_disk / "run")


@pytest.mark.parametrize("multirun", [False, True])
def test_full_disk_at_start_is_reported_before_writing(
    small_disk: Path, tmp_path: Path, multirun: bool
) -> None:
    fill_disk(small_disk, 100_000)
    overrides = ("-m", "hydra.sweep.dir=small/run") if multirun else ("hydra.run.dir=small/run",)
    result = run_app(tmp_path, *overrides, *STATEFUL_RUN)
    assert result.code == STORAGE_EXIT_CODE
    (line,) = result.err.splitlines()
    assert "small: the 1,048,576 bytes that every run needs cannot be written: No space" in line
    assert "bytes are free" in line
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_full_disk_while_a_cache_is_built_is_one_error_and_leaves_nothing(
    small_disk: Path, tmp_path: Path
) -> None:
    write_image_folder(tmp_path / "pets", {"cat": 20, "dog": 20})
    cache = ("data.cache=disk", "data.cache_folder=small/cache", "data.cache_size=512")
    model = ("data=image_folder", "data.path=pets", "data.image_size=16", "model=mlp")
    result = run_app(tmp_path, *model, *cache)
    assert result.code == STORAGE_EXIT_CODE
    (line,) = [line for line in result.err.splitlines() if "No space left on device" in line]
    assert re.search(r"small/cache/images-512x512-\w+\.safetensors \(31,45\d,\d\d\d bytes\)", line)
    assert "bytes are free; set data.cache_folder or a smaller data.cache_size" in line
    assert "Traceback" not in result.err
    assert [path.suffix for path in (small_disk / "cache").iterdir()] == [".lock"]


def start_and_wait_for_file(cwd: Path, file: Path, *overrides: str) -> WarmCommand:
    """Start a run with slow steps, and return once it has written a file."""
    environment = ENVIRONMENT | {"SLOW": "0.3"}
    process = WarmCommand(cwd, [*RUN, *FAULTY_TASK, *overrides], environment)
    wait_for_file(file)
    return process


def fill_disk(disk: Path, free: int) -> None:
    """Leave `free` bytes on the disk."""
    size = shutil.disk_usage(disk).free - free
    (disk / "filler").write_bytes(bytes(max(0, size)))


ALL_WRITERS = (
    "checkpoint.asynchronous=true",
    "callbacks/single@callbacks=[tensorboard,predictions,samples]",
)


@pytest.mark.parametrize(
    ("fate", "overrides"),
    [
        ("deleted", ALL_WRITERS),
        ("moved", ("trainer.devices=2",)),
        ("replaced", ()),
    ],
)
def test_run_folder_that_disappears_is_one_error_and_nothing_grows_in_its_place(
    tmp_path: Path, fate: str, overrides: tuple[str, ...]
) -> None:
    home = tmp_path / "small"
    folder = home / "run"
    file = folder / "checkpoints" / "last.safetensors"
    failed = start_and_wait_for_file(tmp_path, file, *overrides)
    folder.rename(home / "moved")
    if fate == "deleted":
        shutil.rmtree(home / "moved")
    if fate == "replaced":
        folder.mkdir()
    out, _ = failed.communicate(timeout=120)
    assert failed.returncode == STORAGE_EXIT_CODE, out
    (error,) = [line for line in out.splitlines() if "cannot be written" in line]
    assert f"{folder} cannot be written: it was deleted, moved or replaced" in error
    assert "Traceback" not in out
    assert "failed" not in out
    assert {path.name for path in home.iterdir()} == {
        "deleted": set(),
        "moved": {"moved"},
        "replaced": {"moved", "run"},
    }[fate]
    assert not [*folder.glob("*")]
    assert fate == "deleted" or latest_valid(home / "moved")[0] is not None


# Locks


def test_run_lock_held_by_other_process_is_refused_until_it_dies(tmp_path: Path) -> None:
    context = mp.get_context("fork")
    locked, release = context.Event(), context.Event()
    process = context.Process(target=_hold_lock, args=(tmp_path, locked, release))
    process.start()
    assert locked.wait(30)
    with pytest.raises(FolderInUseError, match=rf"is in use.*process {process.pid}"):
        check_unlocked(tmp_path)
    with pytest.raises(FolderInUseError), run_lock(tmp_path):
        pass
    process.kill()
    process.join()
    check_unlocked(tmp_path)  # a dead process holds no lock
    with run_lock(tmp_path):
        assert json.loads((tmp_path / ".owner.json").read_text())["process"] == os.getpid()


def _hold_lock(folder: Path, locked: object, release: object) -> None:
    with run_lock(folder):
        locked.set()  # type: ignore[attr-defined]
        release.wait(60)  # type: ignore[attr-defined]


def test_resume_of_running_run_is_refused_without_changes(tmp_path: Path) -> None:
    process = start_training(tmp_path, fault="slow:0:1")
    folder = tmp_path / "run"
    before = (folder / "config.yaml").stat().st_mtime_ns
    overrides = ("model=mlp", "resume=run")  # its own code is not trusted yet
    second = run_app(tmp_path, *overrides, **ENVIRONMENT)
    assert second.code == 2
    assert "is in use by another run" in second.err
    assert f"process {process.pid}" in second.err
    assert "Traceback" not in second.err
    assert (folder / "config.yaml").stat().st_mtime_ns == before
    assert status_of(folder)["status"] == "running"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    check_unlocked(folder)


@pytest.mark.parametrize("count", [4, pytest.param(32, marks=pytest.mark.long)])
def test_simultaneous_commands_use_different_folders(tmp_path: Path, count: int) -> None:
    overrides = ("model=mlp", "trainer.fast_dev_run=true", "~callbacks.plots")
    commands = [WarmCommand(tmp_path, overrides, {"OMP_NUM_THREADS": "1"}) for _ in range(count)]
    outputs = [command.communicate(250)[0] for command in commands]
    assert [command.returncode for command in commands] == [0] * count, outputs
    statuses = [json.loads(p.read_text()) for p in tmp_path.glob("outputs/*/*/status.json")]
    assert [status["status"] for status in statuses] == ["completed"] * count


# Checkpoints written in the background


def test_sigterm_during_background_save_leaves_valid_checkpoint(tmp_path: Path) -> None:
    overrides = (
        "model.hidden=[3000,3000]",
        "checkpoint.asynchronous=true",
        "trainer.max_epochs=100",
    )
    process = WarmCommand(
        tmp_path, [*STATEFUL_RUN, *overrides, "hydra.run.dir=run"], {"OMP_NUM_THREADS": "1"}
    )
    wait_for_file(tmp_path / "run" / "checkpoints" / ".last.safetensors.part")
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143, out
    assert_readable(tmp_path / "run")
    checkpoint, problems = latest_valid(tmp_path / "run")
    assert checkpoint == tmp_path / "run" / "checkpoints" / "last.safetensors"
    assert not problems
    training = read_store(checkpoint)[1]["training"]
    assert training["mid_epoch"] is not None or training["phase"] == "train"
    assert not [*(tmp_path / "run").rglob("*.part")]


def test_run_end_waits_for_background_save(tmp_path: Path) -> None:
    result = run_app(
        tmp_path,
        *("model=mlp", "model.hidden=[2000,2000]", "trainer.max_epochs=1", *FEW_BATCHES),
        *("trainer.limit_test_batches=2", "checkpoint.asynchronous=true", "hydra.run.dir=run"),
    )
    assert result.code == 0, result.err
    assert_readable(tmp_path / "run")
    assert latest_valid(tmp_path / "run") == (
        tmp_path / "run" / "checkpoints" / "last.safetensors",
        [],
    )
