"""Two machines of one rank each, joined by torchrun: networks of their own on this machine.

The agents meet by `--master-addr`: it names the first node, and that is all they need. By `c10d`
torchrun tells the ranks the name that a node believes to have, which here is `localhost` on both.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.runs import FEW_BATCHES, RunResult, run_app

WORDS = (
    "model=mlp",
    "optimizer=sgd",
    "trainer.max_epochs=1",
    "trainer.precision=fp32",
    "trainer.accelerator=cpu",  # a device for each of two nodes is not to be had
    "trainer.timeout=60",
    "~callbacks.plots",
    *FEW_BATCHES,
)
LIMIT = 200.0  # seconds for a run
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1")


@dataclass(frozen=True)
class Network:
    """Two nodes that reach each other.

    Attributes:
        entrances: The words that let a command run in a node, for each.
        address: Of the first.
        interface: By which it reaches the other; else gloo takes what the name of the machine
            leads to, which is no way out.
    """

    entrances: tuple[tuple[str, ...], tuple[str, ...]]
    address: str
    interface: str


@contextmanager
def on_loopback() -> Iterator[Network]:
    yield Network(((), ()), "127.0.0.1", "lo0" if sys.platform == "darwin" else "lo")


@contextmanager
def in_namespaces() -> Iterator[Network]:
    """Nodes that share nothing but a cable; skips where this machine does not let us lay one."""
    if shutil.which("ip") is None:
        pytest.skip("no network namespaces here: there is no `ip`")
    own = secrets.token_hex(4)
    one, two = names = [f"nodes-{own}-{number}" for number in (1, 2)]
    try:
        ip_or_skip(f"netns add {one}")
        ip_or_skip(f"netns add {two}")
        ip_or_skip(f"link add cable netns {one} type veth peer name cable netns {two}")
        for number, name in enumerate(names, 1):
            ip(f"-n {name} address add 10.77.0.{number}/24 dev cable").check_returncode()
            ip(f"-n {name} link set lo up").check_returncode()
            ip(f"-n {name} link set cable up").check_returncode()
        inside = ("ip", "netns", "exec")
        yield Network(((*inside, one), (*inside, two)), "10.77.0.1", "cable")
    finally:
        for name in names:
            ip(f"netns delete {name}")  # and the cable with it


def ip(words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words.split()], capture_output=True, text=True)


def ip_or_skip(words: str) -> None:
    done = ip(words)
    if done.returncode:
        pytest.skip(f"no network namespaces here: `ip {words}`: {done.stderr.strip()}")


@pytest.fixture(scope="module", params=[on_loopback, in_namespaces], ids=["loopback", "namespaces"])
def network(request: pytest.FixtureRequest) -> Iterator[Network]:
    lay: Callable[[], AbstractContextManager[Network]] = request.param
    with lay() as laid:
        yield laid


def run_nodes(network: Network, cwd: Path, *words: str) -> list[RunResult]:
    """What torchrun came to on each node; `nodeN.txt` has all that it said."""
    port, said = free_port(), [cwd / "node0.txt", cwd / "node1.txt"]
    agents: list[subprocess.Popen[str]] = []
    try:
        for number, entrance in enumerate(network.entrances):
            where = ("--master-addr", network.address, "--master-port", str(port))
            command = [*entrance, *TORCHRUN, "--node-rank", str(number), *where, "-m", "app"]
            agents.append(start([*command, *words], cwd, said[number], network.interface))
        until = time.monotonic() + LIMIT
        codes = [agent.wait(until - time.monotonic()) for agent in agents]
    finally:
        end(agents)
    return [RunResult(code, path.read_text(), "", cwd) for code, path in zip(codes, said, strict=True)]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(command: list[str], cwd: Path, said: Path, interface: str) -> subprocess.Popen[str]:
    with said.open("w") as file:
        return subprocess.Popen(
            command,
            cwd=cwd,
            env=os.environ | {"GLOO_SOCKET_IFNAME": interface},
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def end(agents: Sequence[subprocess.Popen[str]]) -> None:
    """By their agents, as ranks are in no group of theirs; they need 30 s for one that is deaf."""
    for number, patience in ((signal.SIGTERM, 40.0), (signal.SIGKILL, 5.0)):
        alive = [agent for agent in agents if agent.poll() is None]
        for agent in alive:
            os.killpg(agent.pid, number)
        for agent in alive:
            with suppress(subprocess.TimeoutExpired):
                agent.wait(patience)


@pytest.fixture(scope="module")
def nodes(network: Network, tmp_path_factory: pytest.TempPathFactory) -> list[RunResult]:
    """An MLP trained by both."""
    ran = run_nodes(network, tmp_path_factory.mktemp("nodes"), *WORDS)
    assert [node.code for node in ran] == [0, 0], "\n".join(node.out for node in ran)
    return ran


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """The same by one process."""
    ran = run_app(tmp_path_factory.mktemp("alone"), *WORDS)
    assert ran.code == 0, ran.err + ran.out
    return ran


def test_two_nodes_are_one_run(nodes: list[RunResult]) -> None:
    first, second = nodes
    assert (first.status["status"], first.status["ranks"]) == ("completed", 2)
    assert (first.folder / "logs" / "rank1.log").exists()
    stages = ("train_", "valid_", "test_", "")
    assert all((first.folder / f"{stage}summary_table.csv").exists() for stage in stages)
    assert f"results are in {first.folder}" in first.out
    assert "results are in" not in second.out


def test_two_nodes_learn_what_one_process_learns(nodes: list[RunResult], alone: RunResult) -> None:
    found, wanted = (ran.csv("summary_table.csv") for ran in (nodes[0], alone))
    assert list(found["stage"]) == ["train", "valid", "test"]
    # sums of float32, taken in another order
    assert list(found["loss_mean"]) == pytest.approx(list(wanted["loss_mean"]), rel=0, abs=1e-6)
    assert list(found["total_samples"]) == list(wanted["total_samples"])


@pytest.mark.parametrize(
    "network",
    [
        pytest.param(on_loopback, id="loopback"),
        pytest.param(in_namespaces, id="namespaces", marks=pytest.mark.long),  # the words are those
    ],
    indirect=True,
)
def test_a_mistake_is_said_once_and_ends_both_nodes(network: Network, tmp_path: Path) -> None:
    ran = run_nodes(network, tmp_path, "model=mlpp")
    assert all(node.code != 0 for node in ran)
    assert "".join(node.out for node in ran).count("1 error in the configuration") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"node0.txt", "node1.txt"}
