"""Training on two machines with one rank each, started by torchrun.

The machines are simulated, as network namespaces or both on the loopback interface. Both agents get
the address of the first node as `--master-addr`. A `c10d` rendezvous would not work here: torchrun
would pass on the host name of a node, which is `localhost` on both.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.processes import free_port
from tests.support.runs import FEW_BATCHES, RunResult, run_app

OVERRIDES = (
    "model=mlp",
    "optimizer=sgd",
    "trainer.max_epochs=1",
    "trainer.precision=fp32",
    "trainer.accelerator=cpu",  # there is no CUDA device for each of the two nodes
    "trainer.timeout=60",
    "~callbacks.plots",
    *FEW_BATCHES,
)
RUN_TIMEOUT = 200.0  # seconds
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1")


@dataclass(frozen=True)
class Network:
    """Two nodes that can reach each other.

    Attributes:
        command_prefixes: For each node, what to put before a command to run it there.
        address: Address of the first node.
        interface: Interface to the other node, for gloo, which would otherwise choose the interface
            of the host name.
    """

    command_prefixes: tuple[tuple[str, ...], tuple[str, ...]]
    address: str
    interface: str


@contextmanager
def loopback_network() -> Iterator[Network]:
    yield Network(((), ()), "127.0.0.1", "lo0" if sys.platform == "darwin" else "lo")


@contextmanager
def namespace_network() -> Iterator[Network]:
    """Connect two network namespaces by a virtual cable; skip the test where not permitted."""
    if shutil.which("ip") is None:
        pytest.skip("no network namespaces: the command `ip` is missing")
    token = secrets.token_hex(4)
    first, second = names = [f"nodes-{token}-{number}" for number in (1, 2)]
    try:
        run_ip_or_skip(f"netns add {first}")
        run_ip_or_skip(f"netns add {second}")
        run_ip_or_skip(f"link add cable netns {first} type veth peer name cable netns {second}")
        for number, name in enumerate(names, 1):
            run_ip(f"-n {name} address add 10.77.0.{number}/24 dev cable").check_returncode()
            run_ip(f"-n {name} link set lo up").check_returncode()
            run_ip(f"-n {name} link set cable up").check_returncode()
        prefix = ("ip", "netns", "exec")
        yield Network(((*prefix, first), (*prefix, second)), "10.77.0.1", "cable")
    finally:
        for name in names:
            run_ip(f"netns delete {name}")  # deletes the cable too


def run_ip(arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments.split()], capture_output=True, text=True)


def run_ip_or_skip(arguments: str) -> None:
    result = run_ip(arguments)
    if result.returncode:
        pytest.skip(f"no network namespaces: `ip {arguments}`: {result.stderr.strip()}")


@pytest.fixture(
    scope="module",
    params=[loopback_network, namespace_network],
    ids=["loopback", "namespaces"],
)
def network(request: pytest.FixtureRequest) -> Iterator[Network]:
    make_network: Callable[[], AbstractContextManager[Network]] = request.param
    with make_network() as network:
        yield network


def run_nodes(network: Network, cwd: Path, *overrides: str) -> list[RunResult]:
    """Run torchrun on each node; the output of each is in `nodeN.txt` and in its result."""
    port, output_files = free_port(), [cwd / "node0.txt", cwd / "node1.txt"]
    agents: list[subprocess.Popen[str]] = []
    try:
        for number, prefix in enumerate(network.command_prefixes):
            master = ("--master-addr", network.address, "--master-port", str(port))
            command = [*prefix, *TORCHRUN, "--node-rank", str(number), *master, "-m", "app"]
            agents.append(
                start([*command, *overrides], cwd, output_files[number], network.interface)
            )
        deadline = time.monotonic() + RUN_TIMEOUT
        codes = [agent.wait(deadline - time.monotonic()) for agent in agents]
    finally:
        stop(agents)
    return [
        RunResult(code, file.read_text(), "", cwd)
        for code, file in zip(codes, output_files, strict=True)
    ]


def start(
    command: list[str], cwd: Path, output_file: Path, interface: str
) -> subprocess.Popen[str]:
    with output_file.open("w") as file:
        return subprocess.Popen(
            command,
            cwd=cwd,
            env=os.environ | {"GLOO_SOCKET_IFNAME": interface},
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def stop(agents: Sequence[subprocess.Popen[str]]) -> None:
    """Let the agents stop their ranks, which are not in the agents' process groups.

    An agent waits 30 s for a rank that ignores the signal.
    """
    for number, patience in ((signal.SIGTERM, 40.0), (signal.SIGKILL, 5.0)):
        running = [agent for agent in agents if agent.poll() is None]
        for agent in running:
            os.killpg(agent.pid, number)
        for agent in running:
            with suppress(subprocess.TimeoutExpired):
                agent.wait(patience)


@pytest.fixture(scope="module")
def node_results(network: Network, tmp_path_factory: pytest.TempPathFactory) -> list[RunResult]:
    """Results on both nodes of training an MLP together."""
    results = run_nodes(network, tmp_path_factory.mktemp("nodes"), *OVERRIDES)
    assert [node.code for node in results] == [0, 0], "\n".join(node.out for node in results)
    return results


@pytest.fixture(scope="module")
def single_result(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """Result of the same training in one process."""
    result = run_app(tmp_path_factory.mktemp("single"), *OVERRIDES)
    assert result.code == 0, result.err + result.out
    return result


def test_two_nodes_write_one_run_folder(node_results: list[RunResult]) -> None:
    first, second = node_results
    assert (first.status["status"], first.status["ranks"]) == ("completed", 2)
    assert (first.folder / "logs" / "rank1.log").exists()
    stages = ("train_", "valid_", "test_", "")
    assert all((first.folder / f"{stage}summary_table.csv").exists() for stage in stages)
    assert f"results are in {first.folder}" in first.out
    assert "results are in" not in second.out


def test_two_nodes_match_one_process(
    node_results: list[RunResult], single_result: RunResult
) -> None:
    actual, expected = (
        result.csv("summary_table.csv") for result in (node_results[0], single_result)
    )
    assert list(actual["stage"]) == ["train", "valid", "test"]
    # Float32 sums are computed in another order
    assert list(actual["loss_mean"]) == pytest.approx(list(expected["loss_mean"]), rel=0, abs=1e-6)
    assert list(actual["total_samples"]) == list(expected["total_samples"])


@pytest.mark.parametrize(
    "network",
    [
        pytest.param(loopback_network, id="loopback"),
        # Repeats the loopback case on another network
        pytest.param(namespace_network, id="namespaces", marks=pytest.mark.long),
    ],
    indirect=True,
)
def test_config_error_is_printed_once_and_ends_both_nodes(network: Network, tmp_path: Path) -> None:
    results = run_nodes(network, tmp_path, "model=mlpp")
    assert all(node.code != 0 for node in results)
    assert "".join(node.out for node in results).count("1 error in the configuration") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"node0.txt", "node1.txt"}
