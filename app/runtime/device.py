"""Where and how exactly it is computed: accelerator, precision, memory format, peak memory."""

from __future__ import annotations

import sys

import torch

from app.runtime.errors import UserError

Devices = int | str | list[int] | None  # a number, `auto`, ids; None is one


def choose_device(accelerator: str, devices: Devices = None, local_rank: int = 0) -> torch.device:
    """The device of a rank for `auto`, `cpu`, `cuda` or `mps`.

    Args:
        accelerator: Which kind.
        devices: Those wanted of this machine.
        local_rank: The number of the rank on this machine.

    Raises:
        UserError: It is not there.
    """
    kind = _kind(accelerator)
    if kind != "cuda":
        return torch.device(kind)
    found = torch.cuda.device_count()
    if isinstance(devices, list):
        index = devices[local_rank] if local_rank < len(devices) else local_rank
    else:
        index = 0 if found == 1 else local_rank  # SLURM may show each of its tasks a single one
    if index >= found:
        raise UserError(f"trainer.devices={devices!r}: there is no device {index}; it has {found}")
    return torch.device("cuda", index)


def count_devices(accelerator: str, devices: Devices) -> int:
    """How many devices of this machine are wanted.

    Raises:
        UserError: They are not there.
    """
    kind = _kind(accelerator)
    found = torch.cuda.device_count() if kind == "cuda" else 1
    if devices is None or devices == "auto":
        return found if devices == "auto" else 1
    if kind != "cuda" and isinstance(devices, list):
        raise UserError(f"trainer.devices={devices!r}: {kind} has no ids; allowed: a number")
    highest = max(devices) + 1 if isinstance(devices, list) else int(devices)
    if kind != "cpu" and highest > found:
        raise UserError(
            f"trainer.devices={devices!r}: this machine has {found} of {kind}; "
            f"allowed: a number up to {found}, ids from 0 to {found - 1}, auto"
        )
    return len(devices) if isinstance(devices, list) else int(devices)


def _kind(accelerator: str) -> str:
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if accelerator == "auto":
        return available[0]
    if accelerator not in available:
        raise UserError(
            f"trainer.accelerator={accelerator!r} is not on this machine; it has: "
            f"{', '.join(available)}"
        )
    return accelerator


def peak_memory(device: torch.device) -> dict[str, int]:
    """Bytes at most in use so far: of the process, and on a CUDA device."""
    peaks = {}
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peaks["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if device.type == "cuda":
        peaks["peak_device_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    return peaks


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was too little memory; on the CPU torch says so in words alone."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    told = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return told or isinstance(error, kinds)


def describe_device(device: torch.device) -> str:
    """For instance `cuda (NVIDIA H200)` or `cpu (2 threads)`."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"{device.type} ({torch.get_num_threads()} threads)"
