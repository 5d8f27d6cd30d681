"""Who starts the ranks, and which of them this process is."""

from __future__ import annotations

import logging
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from app.runtime.errors import ConfigError, ConfigIssue, one_of

Launcher = Literal["inline", "local", "torchrun", "srun"]
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_ID")
AUTO = "auto"
KEY = "launch"


@dataclass(frozen=True)
class ClusterEnvironment:
    """The ranks of a run, seen from one of them.

    Attributes:
        launcher: Who has started it.
        rank: Its number.
        size: How many there are.
        local_rank: Its number on this machine.
        local_size: How many there are on this machine.
        address: Where they meet.
        port: Likewise.
        hosts: Whether rank 0 opens that port itself; else it is open already.
    """

    launcher: Launcher
    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int
    hosts_store: bool = False


def detect_environment(
    words: Sequence[str], environment: Mapping[str, str]
) -> ClusterEnvironment | None:
    """The world that torchrun or srun has made for this process; None where it stands alone.

    What is typed as `launch=` wins; else the environment tells.

    Raises:
        ConfigError: What is typed is not what the environment tells of.
    """
    typed = next((w.partition("=")[2] for w in reversed(words) if w.startswith(f"{KEY}=")), AUTO)
    if typed in ("torchrun", "srun"):
        needed = TORCHRUN if typed == "torchrun" else SRUN
        missing = [name for name in needed if name not in environment]
        if missing:
            problem = f"={typed!r}, but {typed} has not started this: {one_of(missing)} not set"
            raise ConfigError([ConfigIssue(KEY, problem)])
    if typed == "torchrun" or (typed == AUTO and all(name in environment for name in TORCHRUN)):
        return _of_torchrun(environment)
    if typed == "srun" or (typed == AUTO and _is_step_of_many(environment)):
        return _of_srun(environment)
    return None


def _is_step_of_many(environment: Mapping[str, str]) -> bool:
    """Not so in a batch script, which may see `SLURM_NTASKS` too, but is a single process."""
    return (
        all(name in environment for name in SRUN) and int(environment["SLURM_STEP_NUM_TASKS"]) > 1
    )


def _of_torchrun(environment: Mapping[str, str]) -> ClusterEnvironment:
    rank, size, local = (int(environment[n]) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    return ClusterEnvironment(
        launcher="torchrun",
        rank=rank,
        size=size,
        local_rank=local,
        local_size=int(environment.get("LOCAL_WORLD_SIZE", size)),
        address=environment["MASTER_ADDR"],
        port=int(environment["MASTER_PORT"]),
        hosts_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
    )


def _of_srun(environment: Mapping[str, str]) -> ClusterEnvironment:
    rank, size, local = (
        int(environment[n]) for n in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    )
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST", "localhost")
    return ClusterEnvironment(
        launcher="srun",
        rank=rank,
        size=size,
        local_rank=local,
        local_size=_tasks_here(environment, size),
        address=environment.get("MASTER_ADDR") or first_host(nodes),
        port=int(environment.get("MASTER_PORT") or _port(environment)),
        hosts_store=True,
    )


def first_host(nodes: str) -> str:
    """Of a list as SLURM writes it: `node[03-05,9],other` begins with `node03`."""
    found = re.match(r"([^,\[]+)(?:\[([^,\-\]]+)[^\]]*\])?([^,\[]*)", nodes)
    assert found is not None
    return "".join(part or "" for part in found.groups())


def _tasks_here(environment: Mapping[str, str], size: int) -> int:
    """From `SLURM_STEP_TASKS_PER_NODE`, as `2(x3),1`: three nodes of two tasks, then one of one."""
    counts: list[int] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", str(size)).split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        assert found is not None
        counts += [int(found[1])] * int(found[2] or 1)
    return counts[min(int(environment.get("SLURM_NODEID", 0)), len(counts) - 1)]


def _port(environment: Mapping[str, str]) -> int:
    """The same for all tasks of a step, others for the steps of other jobs on the machine."""
    job, step = (int(environment[name]) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return 20_000 + (job * 17 + step) % 20_000


log = logging.getLogger(__name__)


def requeue() -> None:
    """Asks SLURM to start this job again; what it cannot do is in the log."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        log.error("trainer.requeue=True, but this is no job of SLURM: SLURM_JOB_ID is not set")
        return
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = "{SLURM_ARRAY_JOB_ID}_{SLURM_ARRAY_TASK_ID}".format_map(os.environ)
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        log.error("trainer.requeue=True, but there is no scontrol here; start it again by hand")
    except subprocess.CalledProcessError as error:
        log.error("scontrol requeue %s failed: %s", job, error.stderr.strip())
    else:
        log.info("SLURM will start job %s again", job)
