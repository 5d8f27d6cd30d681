"""Start commands and ranks in tests, wait for them, and check what they leave behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml

from tests.support.warm import WarmCommand

SUPPORT_DIR = str(Path(__file__).parent)
SHORT_RUN = (
    "model=mlp",
    "trainer.max_epochs=2",
    "trainer.limit_train_batches=12",
    "trainer.limit_valid_batches=4",
    "trainer.limit_test_batches=2",
    "~callbacks.plots",
)
FAULTY_TASK = ("task._target_=faulty.FaultyTask", "trusted_targets=[faulty]")
SILENT_LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "root": {"level": "INFO", "handlers": []},
}
Command = subprocess.Popen[str] | WarmCommand


# ---- commands


def start_training(
    cwd: Path, *overrides: str, fault: str = "slow:0:0.3", cold: bool = False
) -> Command:
    """Start a training with data workers, and return once it is at its second step or later."""
    mark = cwd / "mark"
    write_numbered_data(cwd / "conf")
    data = ("--config-dir", str(cwd / "conf"), "data=numbered", "data.loader.num_workers=2")
    arguments = (*data, *SHORT_RUN, *FAULTY_TASK, "hydra.run.dir=run", *overrides)
    environment = {"FAULT": fault, "MARK": str(mark), "PYTHONPATH": SUPPORT_DIR}
    process = start_command(cwd, arguments, cold, **environment)
    wait_for_lines(process, mark, 2)
    return process


def start_command(
    cwd: Path, arguments: Sequence[str], cold: bool = False, **environment: str
) -> Command:
    """Start `python -m app`, with stderr redirected to stdout."""
    if not cold:
        return WarmCommand(cwd, arguments, environment)
    # Keep the path by which these tests found the program, which may not be the installed one.
    paths = (environment.get("PYTHONPATH"), os.environ.get("PYTHONPATH"))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return subprocess.Popen(
        [sys.executable, "-m", "app", *arguments],
        cwd=cwd,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_lines(process: Command, file: Path, count: int, seconds: float = 120) -> None:
    """Wait until the process has written `count` lines to a file."""
    deadline = time.monotonic() + seconds
    while not (file.exists() and len(file.read_text().splitlines()) >= count):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def run_torchrun(
    cwd: Path, *overrides: str, fault: str = "none:0:0"
) -> subprocess.CompletedProcess[str]:
    """Run two ranks under torchrun, each of which imports torch in a new Python process."""
    environment = {"FAULT": fault, "PYTHONPATH": SUPPORT_DIR}
    port = str(free_port())
    with tempfile.NamedTemporaryFile("r") as err:
        command = ["--nproc-per-node", "2", "--master-port", port, "-m", "app", *overrides]
        agent = WarmCommand(cwd, command, environment, Path(err.name), "torch.distributed.run")
        try:
            out, _ = agent.communicate(200)
        finally:
            agent.kill()
        assert agent.returncode is not None
        return subprocess.CompletedProcess(command, agent.returncode, out, err.read())


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@contextmanager
def occupied_port(port: int) -> Iterator[None]:
    """Keep a port in use, by this process unless another one already uses it."""
    with socket.socket() as server:
        with suppress(OSError):
            server.bind(("127.0.0.1", port))
            server.listen()
        yield


# ---- processes


def descendants(pid: int) -> list[int]:
    """Return the ids of all processes below a process."""
    table = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True)
    pairs = [tuple(map(int, line.split())) for line in table.stdout.splitlines()]
    found, queue = [], [pid]
    while queue:
        parent = queue.pop()
        children = [child for child, parent_of_child in pairs if parent_of_child == parent]
        found += children
        queue += children
    return found


def alive_pids(pids: list[int]) -> list[int]:
    """Return the ids of those processes that still run; zombies do not count."""
    stats = [Path(f"/proc/{pid}/stat") for pid in pids]
    return [
        pid
        for pid, stat in zip(pids, stats, strict=True)
        if stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
    ]


def wait_until_exited(pids: list[int], seconds: float = 5.0) -> bool:
    """Wait for processes to exit, and return whether all of them did in time."""
    deadline = time.monotonic() + seconds
    while alive_pids(pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive_pids(pids)


def child_processes() -> list[int]:
    """Return what still runs below this process, except helpers such as the forkserver."""
    return [pid for pid in alive_pids(descendants(os.getpid())) if not _is_helper(pid)]


def _is_helper(pid: int) -> bool:
    cmdline = Path(f"/proc/{pid}/cmdline")
    text = cmdline.read_bytes().decode() if cmdline.exists() else "tracker"
    return "tracker" in text or "wandb" in text or ("forkserver" in text and not _is_forked(pid))


def _is_forked(pid: int) -> bool:
    """Whether a process was forked by the forkserver, whose command line it then shares."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[1]) != os.getpid()


# ---- data and results


def write_tainted_data(conf: Path) -> None:
    """Write a data config in which one training sample, number 13, is NaN."""
    source = "{_target_: faulty.NaNDataset, count: %d, bad: %s}"
    _write_data(conf, "tainted", source % (40, 13), source % (16, "null"))


def write_numbered_data(conf: Path) -> None:
    """Write a data config whose dataset is read sample by sample."""
    source = "{_target_: faulty.FaultyDataset, count: %d}"
    _write_data(conf, "numbered", source % 400, source % 40)


def _write_data(conf: Path, name: str, train: str, valid: str) -> None:
    (conf / "data").mkdir(parents=True)
    (conf / "data" / f"{name}.yaml").write_text(
        "defaults: [base/arrays@_here_, _self_]\n"
        f"name: {name}\npath: null\nnum_classes: 2\ninput_shape: [4]\n"
        "channels: null\nimage_size: null\nbatch_size: 8\nnormalize: null\n"
        f"source:\n  train: {train}\n  valid: {valid}\n  test: {valid}\n"
    )


def status_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "status.json").read_text())
    return content


def assert_two_jobs_completed(cwd: Path) -> None:
    """Assert that a sweep over two learning rates completed on two ranks each."""
    folders = sorted((cwd / "outputs").glob("sweeps/*/*/[0-9]*/"))
    assert [folder.name[:2] for folder in folders] == ["0_", "1_"]
    assert [status_of(folder)["status"] for folder in folders] == ["completed"] * 2
    assert [status_of(folder)["ranks"] for folder in folders] == [2, 2]
    configs = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in folders]
    assert [config["optimizer"]["lr"] for config in configs] == [0.1, 0.01]


def assert_equal_runs(expected: Path, actual: Path) -> None:
    """Assert that two runs have the same weights and the same CSV files, except for times."""
    folders = (expected, actual)
    first, second = (torch.load(folder / "model.pt", weights_only=True) for folder in folders)
    assert all(torch.equal(first[name], second[name]) for name in first)
    files = {path.relative_to(expected) for path in expected.rglob("*.csv")}
    assert files == {path.relative_to(actual) for path in actual.rglob("*.csv")}
    times = ["iter_time", "data_time", "epoch_time", "samples/s"]
    for file in files:
        tables = [pd.read_csv(f / file).drop(columns=times, errors="ignore") for f in folders]
        pd.testing.assert_frame_equal(*tables, check_exact=True)
