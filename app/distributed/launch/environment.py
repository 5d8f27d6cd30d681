"""Detect which launcher has started this process, and as which rank."""

from __future__ import annotations

import logging
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from app.runtime.errors import ConfigError, ConfigIssue, join_choices

log = logging.getLogger(__name__)
Launcher = Literal["inline", "local", "torchrun", "srun"]
LAUNCH_KEY = "launch"
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SRUN_VARIABLES = (
    "SLURM_PROCID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_LOCALID",
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
)


@dataclass(frozen=True)
class ClusterEnvironment:
    """The ranks of a run, as seen by one of them.

    Attributes:
        launcher: Who has started the ranks.
        rank: Global rank of this process.
        world_size: Number of ranks.
        local_rank: Rank on this machine.
        local_world_size: Number of ranks on this machine.
        master_address: Host of the store through which ranks connect.
        master_port: Port of that store.
        hosts_store: Whether rank 0 opens the port itself; else the launcher has opened it.
    """

    launcher: Launcher
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_address: str
    master_port: int
    hosts_store: bool = False


def detect_environment(
    overrides: Sequence[str], variables: Mapping[str, str]
) -> ClusterEnvironment | None:
    """Return the ranks that torchrun or srun has started; None for a single process.

    A `launch=` override takes precedence over what the environment variables say.

    Raises:
        ConfigError: The environment variables of the given launcher are missing.
    """
    launch = next(
        (o.partition("=")[2] for o in reversed(overrides) if o.startswith(f"{LAUNCH_KEY}=")), "auto"
    )
    for launcher, required in (("torchrun", TORCHRUN_VARIABLES), ("srun", SRUN_VARIABLES)):
        missing = [name for name in required if name not in variables]
        if launch == launcher and missing:
            problem = (
                f"={launch!r}, but {launch} has not started this process: "
                f"{join_choices(missing)} not set"
            )
            raise ConfigError([ConfigIssue(LAUNCH_KEY, problem)])
    has_torchrun_variables = all(name in variables for name in TORCHRUN_VARIABLES)
    if launch == "torchrun" or (launch == "auto" and has_torchrun_variables):
        return _from_torchrun(variables)
    if launch == "srun" or (launch == "auto" and _is_multi_task_step(variables)):
        return _from_srun(variables)
    return None


def _is_multi_task_step(variables: Mapping[str, str]) -> bool:
    """Whether srun has started several tasks.

    `SLURM_NTASKS` does not tell: a batch script has it too, but is a single process.
    """
    return (
        all(name in variables for name in SRUN_VARIABLES)
        and int(variables["SLURM_STEP_NUM_TASKS"]) > 1
    )


def _from_torchrun(variables: Mapping[str, str]) -> ClusterEnvironment:
    rank, world_size, local_rank = (
        int(variables[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    )
    return ClusterEnvironment(
        launcher="torchrun",
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=int(variables.get("LOCAL_WORLD_SIZE", world_size)),
        master_address=variables["MASTER_ADDR"],
        master_port=int(variables["MASTER_PORT"]),
        hosts_store=variables.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
    )


def _from_srun(variables: Mapping[str, str]) -> ClusterEnvironment:
    rank, world_size, local_rank = (
        int(variables[name]) for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    )
    nodes = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_NODELIST", "localhost")
    return ClusterEnvironment(
        launcher="srun",
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=_tasks_on_this_node(variables, world_size),
        master_address=variables.get("MASTER_ADDR") or first_host(nodes),
        master_port=int(variables.get("MASTER_PORT") or _default_port(variables)),
        hosts_store=True,
    )


def first_host(nodes: str) -> str:
    """Return the first host of a SLURM node list, e.g. `node03` of `node[03-05,9],other`."""
    match = re.match(r"([^,\[]+)(?:\[([^,\-\]]+)[^\]]*\])?([^,\[]*)", nodes)
    assert match is not None
    return "".join(part or "" for part in match.groups())


def _tasks_on_this_node(variables: Mapping[str, str], world_size: int) -> int:
    """Parse `SLURM_STEP_TASKS_PER_NODE`; `2(x3),1` is three nodes with two tasks, then one."""
    counts: list[int] = []
    for part in variables.get("SLURM_STEP_TASKS_PER_NODE", str(world_size)).split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        assert match is not None
        counts += [int(match[1])] * int(match[2] or 1)
    return counts[min(int(variables.get("SLURM_NODEID", 0)), len(counts) - 1)]


def _default_port(variables: Mapping[str, str]) -> int:
    """Return a port that all tasks of a step agree on and that differs between jobs and steps."""
    job, step = (int(variables[name]) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return 20_000 + (job * 17 + step) % 20_000


def requeue() -> None:
    """Ask SLURM to start this job again; log an error if that is not possible."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        log.error("trainer.requeue=True, but this is not a SLURM job: SLURM_JOB_ID is not set")
        return
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = "{SLURM_ARRAY_JOB_ID}_{SLURM_ARRAY_TASK_ID}".format_map(os.environ)
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        log.error("trainer.requeue=True, but scontrol was not found; resubmit the job by hand")
    except subprocess.CalledProcessError as error:
        log.error("scontrol requeue %s failed: %s", job, error.stderr.strip())
    else:
        log.info("requeued SLURM job %s", job)
