"""Sweeps on Ray: on this machine, and on a cluster of two nodes of which one is lost.

`.ci/run` installs Ray and runs this file after all others, with the machine to itself.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support import sweeps
from tests.support.processes import (
    SUPPORT_DIR,
    descendants,
    free_port,
    status_of,
    wait_until_exited,
)
from tests.support.runs import RunResult, run_cold

pytestmark = pytest.mark.skipif(
    find_spec("hydra_plugins.hydra_ray_launcher") is None, reason="Ray is not installed"
)
RAY = ("hydra/launcher=ray", "+hydra.launcher.ray.init.include_dashboard=false")
START_SECONDS = 300
STEPS = 12  # of an epoch
JOBS = ("seed=0,1,2,3", "+task.step_seconds=0.2")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the processes of Ray more time to start than it allows them, and a token."""
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "200")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    # All nodes of a cluster need the same token; without one, Ray would write one to ~/.ray.
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    monkeypatch.setenv("PYTHONPATH", f"{os.environ.get('PYTHONPATH', '')}:{SUPPORT_DIR}")


@pytest.fixture
def temp_folder() -> Iterator[Path]:
    """A folder for Ray's files, whose sockets need a short path."""
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        yield Path(folder)


@pytest.fixture
def nodes(
    temp_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[int]]:
    """PIDs of the commands that run the two nodes of a cluster, the head first."""
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    head = ("--head", f"--port={free_port()}", f"--temp-dir={temp_folder}")
    started: list[subprocess.Popen[bytes]] = []
    try:
        started.append(start_node(tmp_path, "head.log", *head, "--include-dashboard=false"))
        # Ray replaces the loopback address by another one of this machine.
        found = re.search(r"--address='([^']+)'", (tmp_path / "head.log").read_text())
        assert found is not None
        started.append(start_node(tmp_path, "node.log", f"--address={found[1]}"))
        monkeypatch.setenv("RAY_ADDRESS", found[1])
        yield [node.pid for node in started]
    finally:
        for node in started:
            end_all([node.pid, *descendants(node.pid)])
            node.wait()


def start_node(cwd: Path, log: str, *options: str) -> subprocess.Popen[bytes]:
    """Start a node of Ray that runs one job at a time, and return once it is ready."""
    ray = shutil.which("ray", path=Path(sys.executable).parent)
    command = [str(ray), "start", *options, "--num-cpus=1", "--block", "--disable-usage-stats"]
    with (cwd / log).open("w") as file:
        node = subprocess.Popen(command, cwd=cwd, stdout=file, stderr=file, start_new_session=True)
    try:
        wait_for(lambda: "Ray runtime started" in (cwd / log).read_text())
    except BaseException:
        end_all([node.pid, *descendants(node.pid)])
        raise
    return node


def wait_for(condition: Callable[[], bool], seconds: float = START_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def end_all(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def processes_of(tmp_path: Path) -> list[int]:
    """Return the PIDs of everything that was started in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (process / "cwd").readlink().is_relative_to(tmp_path):
                found.append(int(process.name))
    return found


def steps_by_process(tmp_path: Path) -> dict[int, int]:
    """Return the number of training steps of each process, in the order of their first step."""
    pids = sweeps.step_pids(tmp_path) if (tmp_path / "mark").exists() else []
    return {pid: pids.count(pid) for pid in dict.fromkeys(pids)}


def max_steps(tmp_path: Path, pids: list[int]) -> int:
    """Return the number of training steps of that process of some which has made most."""
    return max((n for pid, n in steps_by_process(tmp_path).items() if pid in pids), default=0)


def is_raylet(pid: int) -> bool:
    return Path(f"/proc/{pid}/cmdline").read_text().partition("\0")[0].endswith("/raylet")


def resume(tmp_path: Path, *repeated: str) -> RunResult:
    folder = sweeps.sweep_folder(tmp_path)
    trust = "trusted_targets=[sweep_task]"
    variables = {"MARK": str(tmp_path / "mark"), "BROKEN": str(tmp_path / "broken")}
    return run_cold(tmp_path, "-m", f"sweep.resume={folder}", trust, *repeated, **variables)


@pytest.mark.timeout(600)
def test_ray_failed_job_and_killed_worker_then_resume(tmp_path: Path, temp_folder: Path) -> None:
    (tmp_path / "broken").touch()
    files = f"+hydra.launcher.ray.init._temp_dir={temp_folder}"
    overrides = (
        *RAY,
        *JOBS,
        "+hydra.launcher.ray.init.num_cpus=2",
        files,
        "+task.fault=raise,nothing,nothing,nothing",
        "+task.fault_step=1",
        "sweep.together=[[seed,task.fault]]",
    )
    try:
        process = sweeps.start_sweep(tmp_path, *overrides, cold=True, seconds=START_SECONDS)
        wait_for(lambda: any(n > STEPS + 1 for n in steps_by_process(tmp_path).values()))
        killed = next(pid for pid, n in steps_by_process(tmp_path).items() if n > STEPS + 1)
        os.kill(killed, signal.SIGKILL)
        printed, _ = process.communicate(timeout=280)
        assert process.returncode == 1, printed
        folder = sweeps.sweep_folder(tmp_path)
        assert sweeps.job_statuses(folder) == ["failed", *["completed"] * 3], printed
        assert wait_until_exited(processes_of(tmp_path), 30.0)
        before = sum(steps_by_process(tmp_path).values())
        # The killed job went on from its checkpoint; nothing else was done twice.
        assert 3 * 2 * STEPS < before <= 1 + 3 * 2 * STEPS + STEPS
        (tmp_path / "broken").unlink()
        ran = resume(tmp_path, files)  # a folder, which a file may not choose
        assert (ran.code, sweeps.job_statuses(folder)) == (0, ["completed"] * 4), ran.out + ran.err
        assert sum(steps_by_process(tmp_path).values()) == before + 2 * STEPS
        assert wait_until_exited(processes_of(tmp_path), 30.0)
    finally:
        end_all(processes_of(tmp_path))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_ray_lost_node_no_job_is_lost_or_run_twice(tmp_path: Path, nodes: list[int]) -> None:
    # The launcher sets this memory itself, which Ray refuses for a cluster that runs already.
    memory = "+hydra.launcher.ray.init.object_store_memory=null"
    address = ("hydra.launcher.ray.init.address=auto", memory)
    try:
        process = sweeps.start_sweep(
            tmp_path, RAY[0], *address, *JOBS, cold=True, seconds=START_SECONDS
        )
        wait_for(lambda: max_steps(tmp_path, descendants(nodes[1])) > STEPS)
        lost = descendants(nodes[1])
        os.kill(next(pid for pid in lost if is_raylet(pid)), signal.SIGKILL)
        printed, _ = process.communicate(timeout=400)
        assert wait_until_exited(lost, 60.0)
        folder = sweeps.sweep_folder(tmp_path)
        statuses = sweeps.job_statuses(folder)
        assert len(statuses) == 4
        assert set(statuses) <= {"completed", "failed"}, printed
        assert (process.returncode, set(statuses)) in [
            (0, {"completed"}),
            (1, {"completed", "failed"}),
        ]
        ran = resume(tmp_path)
        assert (ran.code, sweeps.job_statuses(folder)) == (0, ["completed"] * 4), ran.out + ran.err
        for job in sweeps.job_folders(folder):
            assert status_of(job)["status"] == "completed"
        total = sum(steps_by_process(tmp_path).values())
        assert 4 * 2 * STEPS <= total <= 4 * 2 * STEPS + STEPS  # at most an epoch is repeated
    finally:
        end_all(processes_of(tmp_path))
