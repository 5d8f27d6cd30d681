"""Convert the state dict in a file of `torch.save` to safetensors, within limits.

`app.training.checkpoint.torch_file` runs this as a script, in a process of its own. It executes
nothing in the file, and imports nothing of this program.
"""

from __future__ import annotations

import pickle
import re
import resource
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

WRAPPERS = ("state_dict", "model_state_dict", "model")  # keys under which programs save one


def main(file: str, max_bytes: int, max_seconds: int) -> None:
    """Write the tensors of a file to stdout, or one line about why not to stderr.

    Args:
        file: A file of `torch.save`.
        max_bytes: How much memory to use, besides what the libraries use.
        max_seconds: How much CPU time to use.
    """
    torch.set_num_threads(1)  # threads need memory of their own
    _limit(resource.RLIMIT_CPU, max_seconds)
    _limit(resource.RLIMIT_FSIZE, 0)
    if Path("/proc/self/statm").exists():  # macOS does not limit the address space
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _limit(resource.RLIMIT_AS, used + max_bytes)
    try:
        state_dict = find_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        copies = {name: tensor.detach().clone().contiguous() for name, tensor in state_dict.items()}
        content = safetensors.torch.save(copies)
    except Exception as error:  # noqa: BLE001 - a damaged file can cause any
        sys.exit(describe(error))
    sys.stdout.buffer.write(content)


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    allowed = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (allowed, allowed))


def find_state_dict(content: Any) -> dict[str, Tensor]:
    """Return the named tensors, which other values may surround.

    Raises:
        ValueError: There are none.
    """
    while isinstance(content, dict):
        named = {
            name: value
            for name, value in content.items()
            if isinstance(name, str) and isinstance(value, Tensor)
        }
        wrapper = next((name for name in WRAPPERS if isinstance(content.get(name), dict)), None)
        if wrapper is None and named:
            return named
        content = content[wrapper] if wrapper is not None else None
    raise ValueError("it contains no state dict")


def describe(error: Exception) -> str:
    """Return why a file cannot be read, on one line."""
    text = " ".join(str(error).split())
    if (
        isinstance(error, MemoryError)
        or "can't allocate memory" in text
        or "not enough mem" in text
    ):
        return "its content takes much more memory than the file has bytes"
    if isinstance(error, pickle.UnpicklingError):
        names = re.findall(r"GLOBAL ([\w.]+)", text)
        what = f"objects ({names[0]})" if names else "more than tensors and plain values"
        return (
            f"it contains {what}, which could run code; save the state dict alone: "
            "torch.save(model.state_dict(), FILE)"
        )
    return text[:200] or type(error).__name__


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
