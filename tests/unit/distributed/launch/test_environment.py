"""Detection of ranks that torchrun or srun has started."""

from __future__ import annotations

import pytest

from app.distributed.launch.environment import ClusterEnvironment, detect_environment, first_host
from app.runtime.errors import ConfigError
from tests.support.fake_slurm import STEP_VARIABLES

TORCHRUN_VARIABLES = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}
FIRST_TASK = STEP_VARIABLES | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


def test_detect_environment_torchrun_needs_all_variables() -> None:
    cluster = detect_environment([], TORCHRUN_VARIABLES)
    assert cluster == ClusterEnvironment("torchrun", 3, 4, 1, 2, "node1", 29500, hosts_store=True)
    for missing in set(TORCHRUN_VARIABLES) - {"LOCAL_WORLD_SIZE"}:
        variables = {k: v for k, v in TORCHRUN_VARIABLES.items() if k != missing}
        assert detect_environment([], variables) is None


def test_detect_environment_srun_needs_step_of_several_tasks() -> None:
    variables = STEP_VARIABLES | {"SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
    cluster = detect_environment([], variables)
    assert cluster is not None
    assert (cluster.launcher, cluster.rank, cluster.world_size) == ("srun", 1, 2)
    assert cluster.master_address == "localhost"
    assert detect_environment([], variables | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    batch_script = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}
    assert detect_environment([], batch_script) is None


def test_detect_environment_srun_steps_of_one_job_use_different_ports() -> None:
    clusters = [
        detect_environment([], FIRST_TASK | {"SLURM_STEP_ID": str(step)}) for step in range(20)
    ]
    ports = {cluster.master_port for cluster in clusters if cluster is not None}
    assert len(ports) == 20
    assert all(1024 < port < 65536 for port in ports)


def test_detect_environment_launch_override_takes_precedence() -> None:
    assert detect_environment(["launch=inline"], TORCHRUN_VARIABLES) is None
    assert detect_environment(["launch=local"], FIRST_TASK) is None
    problem = "launch='torchrun', but torchrun has not started this"
    with pytest.raises(ConfigError, match=problem):
        detect_environment(["launch=torchrun"], {"RANK": "0"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("localhost", "localhost"),
        ("node[03-05,9],other", "node03"),
        ("gpu-a12,gpu-b1", "gpu-a12"),
        ("rack[1,3]-n", "rack1-n"),
    ],
)
def test_first_host_slurm_node_list_returns_first(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
