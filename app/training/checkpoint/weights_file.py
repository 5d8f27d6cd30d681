"""Files of weights that a training can start from, and what kind of file each is.

This module does not import torch, because the command line looks at such files before it starts.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path

from safetensors import safe_open

from app.runtime.errors import UserError, did_you_mean
from app.training.checkpoint.header import READ_ERRORS, as_read_error
from app.training.checkpoint.rotation import find_checkpoint

ALLOWED = "a run folder, a checkpoint, a .pt or .safetensors file"
# How files of torch.save begin: zip files since torch 1.6, and pickles before.
TORCH_STARTS = (b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")


class WeightsFormat(Enum):
    """What a file of weights is."""

    CHECKPOINT = "a checkpoint of this program"
    SAFETENSORS = "a safetensors file of another program"
    TORCH = "a file of torch.save"


def find_weights_file(path: Path) -> Path:
    """Return the file of weights that `init.weights` names.

    Args:
        path: A file, or a run folder, whose best checkpoint is meant.

    Raises:
        UserError: There is no such file, or it contains no weights.
    """
    if not path.exists():
        parent = path.parent
        siblings = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
        hint = did_you_mean(path.name, siblings)
        raise UserError(f"init.weights={str(path)!r} does not exist; allowed: {ALLOWED}{hint}")
    file = find_checkpoint(path, "init.weights")
    read_format(file)
    return file


def read_format(file: Path) -> WeightsFormat:
    """Return what a file of weights is, from its first bytes.

    Raises:
        UserError: It is none.
    """
    if not file.is_file():  # opening a FIFO would block
        raise UserError(f"init.weights={str(file)!r} is not a file; allowed: {ALLOWED}")
    try:
        with file.open("rb") as opened:
            if opened.read(max(map(len, TORCH_STARTS))).startswith(TORCH_STARTS):
                return WeightsFormat.TORCH
        with safe_open(file, "np") as safetensors:
            metadata = safetensors.metadata() or {}
    except READ_ERRORS as error:
        problem = as_read_error(file, error)
        raise UserError(f"init.weights: {problem}; allowed: {ALLOWED}") from error
    is_own = "format" in metadata and "content" in metadata
    return WeightsFormat.CHECKPOINT if is_own else WeightsFormat.SAFETENSORS
