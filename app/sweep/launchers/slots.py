"""Divide the GPUs or CPU cores of this machine into slots, one for each parallel job."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from app.distributed.launch.worker import num_cores
from app.runtime.errors import ConfigError, ConfigIssue, join_choices

CPU_JOB_BYTES = 2 * 2**30  # memory to reserve per job on the CPU; torch alone takes about 1 GiB
UNKNOWN_MEMORY_BYTES = 2**40  # assumed where the system does not report its memory
Devices = Literal["auto"] | int | list[int] | None  # as `trainer.devices`


@dataclass(frozen=True)
class Slot:
    """A share of the machine that runs one job at a time.

    Attributes:
        number: Number of the slot, counted from 0.
        gpus: Ids for `CUDA_VISIBLE_DEVICES`; empty on the CPU.
        threads: CPU threads for all ranks of a job.
    """

    number: int
    gpus: tuple[str, ...]
    threads: int

    def __str__(self) -> str:
        gpus = f"GPU {', '.join(self.gpus)}, " if self.gpus else ""
        return f"{self.number}: {gpus}{self.threads} threads"

    def environment(self, ranks: int) -> dict[str, str]:
        """Return the environment variables of a job with that number of ranks."""
        set_by_user = os.environ.get("OMP_NUM_THREADS", "")
        threads = set_by_user or str(max(1, self.threads // ranks))
        gpus = {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else {}
        return {"OMP_NUM_THREADS": threads, **gpus}


def make_slots(
    accelerator: str,
    devices: Devices,
    slots: int | Literal["auto"],
    gpus: Sequence[int] | Literal["auto"],
) -> list[Slot]:
    """Divide the machine into slots.

    With more slots than groups of GPUs, several jobs share a group.

    Args:
        accelerator: Accelerator of the jobs, as `trainer.accelerator`.
        devices: Number of devices per job, as `trainer.devices`.
        slots: Number of slots; `auto` for as many as the GPUs, or cores and memory, allow.
        gpus: Indices of the GPUs to use; `auto` for all.

    Raises:
        ConfigError: The machine lacks one of the GPUs, or has too few for a job.
    """
    visible = _visible_gpus(accelerator)
    selected = list(range(len(visible))) if gpus == "auto" else list(gpus)
    missing = [str(gpu) for gpu in selected if gpu not in range(len(visible))]
    if missing:
        allowed = join_choices(map(str, range(len(visible))))
        problem = f"={list(gpus)}: there is no GPU {', '.join(missing)}; available: {allowed}"
        raise ConfigError([ConfigIssue("hydra.launcher.gpus", problem)])
    ranks = num_ranks(devices, len(selected))
    if selected and ranks > len(selected):
        problem = f"={devices!r}, but the pool has {len(selected)} GPUs"
        raise ConfigError([ConfigIssue("trainer.devices", problem)])
    ids = tuple(visible[gpu] for gpu in selected)
    groups = [ids[first : first + ranks] for first in range(0, len(ids) - ranks + 1, ranks)]
    cores = num_cores()
    cpu_slots = max(1, min(cores // ranks, _memory_bytes() // CPU_JOB_BYTES))
    count = slots if slots != "auto" else len(groups) or cpu_slots
    threads = max(1, cores // count)
    return [Slot(n, groups[n % len(groups)] if groups else (), threads) for n in range(count)]


def num_ranks(devices: Devices, num_gpus: int) -> int:
    """Return the number of ranks of a job.

    Args:
        devices: As `trainer.devices`.
        num_gpus: GPUs of the pool, or of the job's slot.

    Raises:
        ConfigError: `devices` lists particular devices, which the pool assigns itself.
    """
    if isinstance(devices, list):
        problem = f"={devices}: the pool assigns devices to jobs; allowed: a number, auto, null"
        raise ConfigError([ConfigIssue("trainer.devices", problem)])
    if devices == "auto":
        return max(1, num_gpus)
    return devices or 1


def _visible_gpus(accelerator: str) -> list[str]:
    if accelerator not in ("auto", "gpu", "cuda"):
        return []
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    ids = visible.split(",") if visible else [str(number) for number in range(count)]
    return ids[:count]


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return UNKNOWN_MEMORY_BYTES
