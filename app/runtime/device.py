"""Choose and describe devices, measure peak memory and recognize out-of-memory errors."""

from __future__ import annotations

import sys

import torch

from app.runtime.errors import UserError

Devices = int | str | list[int] | None  # a count, `auto`, or device ids; None means one


def choose_device(accelerator: str, devices: Devices = None, local_rank: int = 0) -> torch.device:
    """Return the device of a rank.

    Args:
        accelerator: `auto`, `cpu`, `gpu`, `cuda` or `mps`.
        devices: The devices of this machine to use.
        local_rank: Rank on this machine.

    Raises:
        UserError: The accelerator or the device is not available.
    """
    kind = _resolve_accelerator(accelerator)
    if kind != "cuda":
        return torch.device(kind)
    available = torch.cuda.device_count()
    if isinstance(devices, list):
        index = devices[local_rank] if local_rank < len(devices) else local_rank
    else:
        index = 0 if available == 1 else local_rank  # SLURM may show each task one device only
    if index >= available:
        raise UserError(
            f"trainer.devices={devices!r}: device {index} does not exist; this machine has "
            f"{available}"
        )
    return torch.device("cuda", index)


def count_devices(accelerator: str, devices: Devices) -> int:
    """Return how many devices of this machine to use.

    Raises:
        UserError: They are not available.
    """
    kind = _resolve_accelerator(accelerator)
    available = torch.cuda.device_count() if kind == "cuda" else 1
    if devices is None or devices == "auto":
        return available if devices == "auto" else 1
    if kind != "cuda" and isinstance(devices, list):
        raise UserError(
            f"trainer.devices={devices!r}: {kind} devices have no ids; allowed: a number"
        )
    required = max(devices) + 1 if isinstance(devices, list) else int(devices)
    if kind != "cpu" and required > available:
        raise UserError(
            f"trainer.devices={devices!r}: this machine has {available} {kind} devices; "
            f"allowed: a number up to {available}, ids from 0 to {available - 1}, auto"
        )
    return len(devices) if isinstance(devices, list) else int(devices)


def _resolve_accelerator(accelerator: str) -> str:
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if accelerator == "auto" or (accelerator == "gpu" and len(available) > 1):
        return available[0]
    if accelerator not in available:
        raise UserError(
            f"trainer.accelerator={accelerator!r} is not available on this machine; available: "
            f"{', '.join(available)}"
        )
    return accelerator


def peak_memory(device: torch.device) -> dict[str, int]:
    """Return the peak memory so far in bytes, of this process and of a CUDA device."""
    peaks = {}
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peaks["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if device.type == "cuda":
        peaks["peak_device_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    return peaks


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out.

    On the CPU, torch raises a plain `RuntimeError`, which only its message tells apart.
    """
    cpu_error = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return cpu_error or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def describe_device(device: torch.device) -> str:
    """Return for example `cuda (NVIDIA H200)` or `cpu (2 threads)`."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"{device.type} ({torch.get_num_threads()} threads)"
