"""The disk fills up, folders go, permissions are lost, two want the same folder."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from app.runtime.lock import FolderInUse, check_unlocked, run_lock
from app.training.checkpoint.rotation import latest_valid
from tests.support.killed_runs import STATEFUL_RUN, assert_readable, wait_for_file
from tests.support.processes import TESTS, assert_equal_runs, started, status_of
from tests.support.runs import FEW, run_app
from tests.support.warm import WarmCommand

STORAGE = 74
TASK = ("task._target_=faulty.FaultyTask", "trusted_targets=[faulty]")
ENVIRONMENT = {"PYTHONPATH": TESTS, "FAULT": "none:0:0"}
RUN = (*STATEFUL_RUN, "hydra.run.dir=small/run", "resume=auto")


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
    ran = run_app(cwd, *STATEFUL_RUN, "hydra.run.dir=whole")
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
    ran = run_app(tmp_path, *words, *STATEFUL_RUN)
    assert ran.code == STORAGE
    (line,) = ran.err.splitlines()
    assert "small: the 1,048,576 bytes that any run needs cannot be written: No space" in line
    assert "bytes are free" in line
    assert [path.name for path in small.iterdir()] == ["filler"]


def started_on(cwd: Path, first: Path) -> WarmCommand:
    """A command that has just written its first state, and goes on slowly."""
    process = WarmCommand(cwd, [*RUN, *TASK], ENVIRONMENT | {"SLOW": "0.3"})
    wait_for_file(first)
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


# ---- saving in the background


def test_a_signal_with_a_save_in_flight_leaves_it_whole(tmp_path: Path) -> None:
    words = ("model.hidden=[3000,3000]", "checkpoint.asynchronous=true", "trainer.max_epochs=100")
    process = WarmCommand(tmp_path, [*STATEFUL_RUN, *words, "hydra.run.dir=run"], {"OMP_NUM_THREADS": "1"})
    wait_for_file(tmp_path / "run" / "checkpoints" / ".last.pt.part")
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
