"""Which part of the machine each of several jobs gets."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from app.runtime.errors import ConfigError, ConfigIssue, join_choices

MEMORY = 2 * 2**30  # bytes for each job on the CPU: torch itself takes a good part of one


@dataclass(frozen=True)
class Slot:
    """A place for one job at a time.

    Attributes:
        number: Its own.
        gpus: As `CUDA_VISIBLE_DEVICES` names them; none on the CPU.
        threads: For the whole job.
    """

    number: int
    gpus: tuple[str, ...]
    threads: int

    def environment(self, ranks: int) -> dict[str, str]:
        """The variables of a job on so many ranks."""
        given = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "")}
        threads = given["OMP_NUM_THREADS"] or str(max(1, self.threads // ranks))
        gpus = {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else {}
        return {"OMP_NUM_THREADS": threads, **gpus}


Devices = Literal["auto"] | int | list[int] | None  # as `trainer.devices`


def make_slots(
    accelerator: str,
    devices: Devices,
    slots: int | Literal["auto"],
    gpus: Sequence[int] | Literal["auto"],
) -> list[Slot]:
    """The machine, shared out.

    Where there are more slots than GPUs for them, several jobs share a GPU.

    Args:
        accelerator: On which jobs run, as `trainer.accelerator`.
        devices: How many a job takes.
        slots: How many; `auto` as many as there are devices (or cores, and memory) for.
        gpus: Their ids; `auto` is all of them.

    Raises:
        ConfigError: The machine has no such GPUs, or not enough for a job.
    """
    visible = _visible(accelerator)
    chosen = list(range(len(visible))) if gpus == "auto" else list(gpus)
    missing = [str(gpu) for gpu in chosen if gpu not in range(len(visible))]
    if missing:
        there = join_choices(map(str, range(len(visible))))
        problem = f"={list(gpus)}: there is no GPU {', '.join(missing)}; there is: {there}"
        raise ConfigError([ConfigIssue("hydra.launcher.gpus", problem)])
    ranks = num_ranks(devices, len(chosen))
    if chosen and ranks > len(chosen):
        problem = f"={devices!r}, but the pool has {len(chosen)} GPUs"
        raise ConfigError([ConfigIssue("trainer.devices", problem)])
    cores = _cores()
    possible = len(chosen) // ranks if chosen else min(cores // ranks, _memory() // MEMORY)
    count = max(1, possible) if slots == "auto" else slots
    groups = len(chosen) // ranks if chosen else 0
    return [
        Slot(
            number,
            tuple(visible[gpu] for gpu in _part(chosen, number % groups, ranks)) if groups else (),
            max(1, cores // count),
        )
        for number in range(count)
    ]


def _part(chosen: Sequence[int], group: int, ranks: int) -> Sequence[int]:
    return chosen[group * ranks : (group + 1) * ranks]


def num_ranks(devices: Devices, gpus: int) -> int:
    """How many ranks a job has.

    Args:
        devices: Of the job.
        gpus: In all of the pool, or in its slot.

    Raises:
        ConfigError: It names devices, which only the pool can.
    """
    if isinstance(devices, list):
        problem = f"={devices}: the pool chooses them; allowed: how many, auto, null"
        raise ConfigError([ConfigIssue("trainer.devices", problem)])
    if devices == "auto":
        return max(1, gpus)
    return devices or 1


def _visible(accelerator: str) -> list[str]:
    if accelerator not in ("auto", "cuda"):
        return []
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    ids = named.split(",") if named else [str(number) for number in range(count)]
    return ids[:count]


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> int:
    """Of the machine, in bytes; plenty where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 2**40
