"""Commands and ranks that tests start, watch and leave behind them."""

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

TESTS = str(Path(__file__).parent)


SHORT = (
    "model=mlp",
    "trainer.max_epochs=2",
    "trainer.limit_train_batches=12",
    "trainer.limit_valid_batches=4",
    "trainer.limit_test_batches=2",
    "~callbacks.plots",
)


FAULTY = ("task._target_=faulty.FaultyTask", "trusted_targets=[faulty]")


SILENT: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "root": {"level": "INFO", "handlers": []},
}


def status_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "status.json").read_text())
    return content


def descendants(pid: int) -> list[int]:
    """Of a process, as the system tells."""
    told = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True)
    pairs = [tuple(map(int, line.split())) for line in told.stdout.splitlines()]
    found, todo = [], [pid]
    while todo:
        parent = todo.pop()
        children = [child for child, its in pairs if its == parent]
        found += children
        todo += children
    return found


def alive(pids: list[int]) -> list[int]:
    """Those that still run; a dead one that nobody has asked for is dead."""
    states = [Path(f"/proc/{pid}/stat") for pid in pids]
    return [
        pid
        for pid, state in zip(pids, states, strict=True)
        if state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"
    ]


def gone(pids: list[int], seconds: float = 5.0) -> bool:
    """Whether all have ended by then."""
    until = time.monotonic() + seconds
    while alive(pids) and time.monotonic() < until:
        time.sleep(0.05)
    return not alive(pids)


def own_processes() -> list[int]:
    """What still runs below this one, but for multiprocessing's own servants."""
    return [pid for pid in alive(descendants(os.getpid())) if not _serves(pid)]


def _serves(pid: int) -> bool:
    words = Path(f"/proc/{pid}/cmdline")
    text = words.read_bytes().decode() if words.exists() else "tracker"
    return "tracker" in text or "wandb" in text or ("forkserver" in text and not _is_rank(pid))


def _is_rank(pid: int) -> bool:
    """Forked, it has the words of the one it comes from."""
    told = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(told[1]) != os.getpid()


Command = subprocess.Popen[str] | WarmCommand


def begun(cwd: Path, words: Sequence[str], cold: bool = False, **environment: str) -> Command:
    """`python -m app` with those words; what it says of errors is among the rest."""
    if not cold:
        return WarmCommand(cwd, words, environment)
    return subprocess.Popen(
        [sys.executable, "-m", "app", *words],
        cwd=cwd,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_lines(process: Command, file: Path, count: int) -> None:
    """Until it has written so many."""
    until = time.monotonic() + 120
    while not (file.exists() and len(file.read_text().splitlines()) >= count):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.05)


def started(cwd: Path, *words: str, fault: str = "slow:0:0.3", cold: bool = False) -> Command:
    """A command under way, at its second step of training or later; with readers of data."""
    mark = cwd / "mark"
    write_numbered(cwd / "conf")
    readers = ("--config-dir", str(cwd / "conf"), "data=numbered", "data.loader.num_workers=2")
    words = (*readers, *SHORT, *FAULTY, "hydra.run.dir=run", *words)
    process = begun(cwd, words, cold, FAULT=fault, MARK=str(mark), PYTHONPATH=TESTS)
    wait_for_lines(process, mark, 2)
    return process


def write_tainted(conf: Path) -> None:
    """Data of which a single sample of training, number 13, is no number."""
    source = "{_target_: faulty.Tainted, count: %d, bad: %s}"
    _write_data(conf, "tainted", source % (40, 13), source % (16, "null"))


def write_numbered(conf: Path) -> None:
    """Data that is read sample by sample."""
    source = "{_target_: faulty.Numbered, count: %d}"
    _write_data(conf, "numbered", source % 400, source % 40)


def _write_data(conf: Path, name: str, train: str, valid: str) -> None:
    (conf / "data").mkdir(parents=True)
    (conf / "data" / f"{name}.yaml").write_text(
        "defaults: [base/arrays@_here_, _self_]\n"
        f"name: {name}\npath: null\nnum_classes: 2\ninput_shape: [4]\n"
        "channels: null\nimage_size: null\nbatch_size: 8\nnormalize: null\n"
        f"source:\n  train: {train}\n  valid: {valid}\n  test: {valid}\n"
    )


def assert_two_jobs(cwd: Path) -> None:
    folders = sorted((cwd / "outputs").glob("sweeps/*/*/[0-9]*/"))
    assert [folder.name[:2] for folder in folders] == ["0_", "1_"]
    assert [status_of(folder)["status"] for folder in folders] == ["completed"] * 2
    assert [status_of(folder)["ranks"] for folder in folders] == [2, 2]
    configs = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in folders]
    assert [config["optimizer"]["lr"] for config in configs] == [0.1, 0.01]


def torchrun(cwd: Path, *words: str, fault: str = "none:0:0") -> subprocess.CompletedProcess[str]:
    """Itself warm; the ranks that it starts are cold, as it gives them a Python of their own."""
    environment = {"FAULT": fault, "PYTHONPATH": TESTS}
    with tempfile.NamedTemporaryFile("r") as err:
        command = ["--nproc-per-node", "2", "--master-port", str(free_port()), "-m", "app", *words]
        agent = WarmCommand(cwd, command, environment, Path(err.name), "torch.distributed.run")
        try:
            out, _ = agent.communicate(200)
        finally:
            agent.kill()
        assert agent.returncode is not None
        return subprocess.CompletedProcess(command, agent.returncode, out, err.read())


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def port_taken(port: int) -> Iterator[None]:
    """The one that torch would take; by this test, or by whoever has it already."""
    with socket.socket() as taken:
        with suppress(OSError):
            taken.bind(("127.0.0.1", port))
            taken.listen()
        yield


def assert_equal_runs(wanted: Path, found: Path) -> None:
    """But for times."""
    one, other = (torch.load(folder / "model.pt", weights_only=True) for folder in (wanted, found))
    assert all(torch.equal(one[name], other[name]) for name in one)
    files = {path.relative_to(wanted) for path in wanted.rglob("*.csv")}
    assert files == {path.relative_to(found) for path in found.rglob("*.csv")}
    times = ["iter_time", "epoch_time", "samples/s"]
    for file in files:
        tables = [
            pd.read_csv(f / file).drop(columns=times, errors="ignore") for f in (wanted, found)
        ]
        pd.testing.assert_frame_equal(*tables, check_exact=True)
