"""Read state dicts that were saved by `torch.save`, without executing anything in the file.

Such a file is a pickle. It is read with `weights_only=True` by a process of its own, which has
limits of memory and time, cannot write files, and does not get the environment variables of the
user. Its answer is a safetensors file.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import safetensors.torch
from torch import Tensor

from app.runtime.errors import UserError
from app.runtime.escaping import escape_control
from app.training.checkpoint.header import READ_ERRORS, as_read_error

SCRIPT = Path(__file__).with_name("convert_torch_file.py")
ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR")
MEMORY_PER_BYTE = 4  # the content, its copy, and the answer twice
MIN_MEMORY = 2**28
BYTES_PER_SECOND = 2**24
MIN_SECONDS = 120  # importing torch on a busy machine takes most of them


def read_torch_file(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a state dict that `torch.save` saved, alone or in a dict of others.

    Raises:
        UserError: The file contains anything but tensors and plain values, no state dict, or takes
            more memory or time than a state dict of its size.
    """
    size = file.stat().st_size
    seconds = MIN_SECONDS + size // BYTES_PER_SECOND
    limits = [str(MIN_MEMORY + MEMORY_PER_BYTE * size), str(seconds)]
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(SCRIPT), str(file.absolute()), *limits],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=environment,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{file} cannot be read: it took more than {seconds} seconds") from error
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        reason = escape_control(lines[-1])[:400] if lines else f"exit code {done.returncode}"
        raise UserError(f"{file} cannot be read: {reason}")
    try:
        return safetensors.torch.load(done.stdout)
    except READ_ERRORS as error:
        raise as_read_error(file, error) from error
