"""Who starts the ranks: this program, torchrun or srun; what is chosen, and what is refused."""

from __future__ import annotations

import pytest

from app.distributed.launch.environment import ClusterEnvironment, detect_environment, first_host
from app.distributed.launch.select import check_environment
from app.runtime.errors import ConfigError, UserError
from tests.support.fake_slurm import STEP
from tests.support.runs import job_for, mistakes_in

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}


def test_torchrun_is_known_by_all_of_its_variables() -> None:
    world = detect_environment([], TORCHRUN)
    assert world == ClusterEnvironment("torchrun", 3, 4, 1, 2, "node1", 29500, hosts_store=True)
    for name in set(TORCHRUN) - {"LOCAL_WORLD_SIZE"}:
        assert detect_environment([], {k: v for k, v in TORCHRUN.items() if k != name}) is None


def test_srun_is_known_inside_a_step_of_several_tasks() -> None:
    environment = STEP | {"SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
    world = detect_environment([], environment)
    assert world is not None
    assert (world.launcher, world.rank, world.size, world.address) == ("srun", 1, 2, "localhost")
    assert detect_environment([], environment | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    batch = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}
    assert detect_environment([], batch) is None


def test_steps_of_one_job_do_not_meet() -> None:
    environment = STEP | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    ports = {
        detect_environment([], environment | {"SLURM_STEP_ID": str(n)}).port for n in range(20)
    }  # type: ignore[union-attr]
    assert len(ports) == 20
    assert all(1024 < port < 65536 for port in ports)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("localhost", "localhost"),
        ("node[03-05,9],other", "node03"),
        ("gpu-a12,gpu-b1", "gpu-a12"),
        ("rack[1,3]-n", "rack1-n"),
    ],
)
def test_the_first_host_of_slurms_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_what_is_typed_wins() -> None:
    assert detect_environment(["launch=inline"], TORCHRUN) is None
    assert (
        detect_environment(["launch=local"], STEP | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
        is None
    )
    with pytest.raises(ConfigError, match="launch='torchrun', but torchrun has not started this"):
        detect_environment(["launch=torchrun"], {"RANK": "0"})


def test_a_launcher_that_did_not_start_it_is_refused() -> None:
    world = ClusterEnvironment("torchrun", 0, 2, 0, 2, "x", 1)
    with pytest.raises(UserError, match="launch='local', but torchrun has started this"):
        check_environment(job_for("launch=local").config, world)
    with pytest.raises(UserError, match=r"mode='find_lr' runs on one device"):
        check_environment(job_for("mode=find_lr").config, world)
    with pytest.raises(UserError, match=r"data.batch_size=1 is for all devices together"):
        check_environment(job_for("data.batch_size=1").config, world)


@pytest.mark.parametrize(
    ("words", "mistake"),
    [
        (["trainer.devices=0"], "trainer.devices=0"),
        (["trainer.devices=many"], "trainer.devices='many'"),
        (["trainer.devices=[1,1]"], "trainer.devices=[1, 1]: allowed: ids, each once"),
        (["trainer.devices=4", "data.batch_size=2"], "fewer than the 4 of trainer.devices"),
        (["trainer.strategy=fsdp", "trainer.precision=fp16"], "does not go with trainer.strategy"),
        (["trainer.strategy=dp"], "trainer.strategy='dp'"),
        (
            ["trainer.strategy=fsdp", "trainer.channels_last=true"],
            "trainer.channels_last=True",
        ),
        (["trainer.strategy=fsdp", "experiment=shapes_patches"], "task.patches does not go with"),
        (["launch=mpi"], "launch='mpi'"),
        (["trainer.max_time=soon"], "trainer.max_time='soon' is no time"),
        (["trainer.max_time='1:99:00'"], "is no time"),
        (["trainer.requeue=true"], "give resume=auto, too"),
        (["resume=auto"], "needs a folder that stays the same"),
        (["resume=nowhere"], "holds no run to go on"),
    ],
)
def test_wrong_devices_and_launchers_are_named(words: list[str], mistake: str) -> None:
    assert any(mistake in found for found in mistakes_in(*words)), mistakes_in(*words)
