"""Save and load checkpoints, which contain only tensors and plain Python values."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor, nn

from app.config.limits import load_json
from app.distributed.collectives import is_distributed
from app.distributed.strategies import load_full_state_dict
from app.runtime.errors import UserError, did_you_mean, join_choices
from app.runtime.files import atomic_write
from app.training.checkpoint.archive_reader import load_plain, refuse_distributed
from app.training.checkpoint.checksum import (
    CheckpointInfo,
    verify_checksum,
    write_archive,
    write_with_checksum,
)
from app.training.checkpoint.content_check import check_content
from app.training.checkpoint.rotation import (
    CHECKPOINT_DIR,
    LAST_CHECKPOINT,
    CheckpointRotation,
    list_checkpoints,
)
from app.training.history import Row

FORMAT_VERSION = 3
BEST_CHECKPOINT = "best.pt"


@dataclass(frozen=True)
class Checkpoint:
    """Content of a checkpoint file.

    Attributes:
        config: Resolved configuration of the run; None if the trainer was built from Python.
        template: The same configuration as YAML text with its interpolations.
        model: State dict of the model, on the CPU.
        task: State of the task besides the model, such as learned loss weights.
        epoch: Last epoch trained on, counted from 1.
        history: One row for each finished stage.
        training: State of the optimizer, schedule, scaler and callbacks; None in a weights-only
            checkpoint.
        number: Sequence number of a training checkpoint within its run.
    """

    config: dict[str, Any] | None
    template: str | None
    model: dict[str, Tensor]
    task: dict[str, Any]
    epoch: int
    history: list[Row]
    training: dict[str, Any] | None
    number: int = 0

    @property
    def info(self) -> CheckpointInfo:
        """Summary stored at the end of the file, readable without loading it."""
        kind: Literal["state", "weights"] = "weights" if self.training is None else "state"
        return CheckpointInfo(kind, self.epoch, self.number)


def save_checkpoint(
    path: Path, checkpoint: Checkpoint, rotation: CheckpointRotation | None = None
) -> None:
    """Save a checkpoint atomically, with a checksum.

    Args:
        path: Destination; a rotation always writes `last.pt`.
        checkpoint: What to save.
        rotation: For a training checkpoint: renames the older ones and removes the oldest.
    """
    content = {
        "format": FORMAT_VERSION,
        "config": json.dumps(checkpoint.config),
        "template": checkpoint.template,
        "model": checkpoint.model,
        "task": checkpoint.task,
        "epoch": checkpoint.epoch,
        "history": json.dumps(checkpoint.history),
        "training": checkpoint.training,
    }

    def write(file: BinaryIO) -> None:
        write_with_checksum(
            file, path.name, checkpoint.info, lambda inner: torch.save(content, inner)
        )

    if rotation is None:
        atomic_write(path, write)
    else:
        rotation.write(write)


def load_checkpoint(path: Path) -> Checkpoint:
    """Load a checkpoint without executing anything in it.

    Args:
        path: A checkpoint file or a run folder.

    Raises:
        UserError: The checkpoint is missing, damaged, contains code, or was not written by this
            program.
    """
    refuse_distributed(path)
    file = find_checkpoint(path)
    verify_checksum(file)
    content = load_plain(file)
    if not isinstance(content, dict) or "format" not in content:
        raise UserError(f"{file} is not a checkpoint of this program")
    if content["format"] != FORMAT_VERSION:
        raise UserError(
            f"{file} has format {content['format']!r}; this program reads format {FORMAT_VERSION}"
        )
    check_content(file, content)
    return Checkpoint(
        config=load_json(content["config"], f"{file}: config"),
        template=content["template"],
        model=content["model"],
        task=content["task"],
        epoch=content["epoch"],
        history=load_json(content["history"], f"{file}: history"),
        training=content["training"],
    )


def find_checkpoint(path: Path) -> Path:
    """Return the file itself, or the best checkpoint of a run folder, or else its last.

    Raises:
        UserError: The folder contains no checkpoint.
    """
    if path.is_file():
        return path
    candidates = [path / CHECKPOINT_DIR / BEST_CHECKPOINT, *list_checkpoints(path)]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        raise UserError(
            f"ckpt={str(path)!r} contains no checkpoint: no {CHECKPOINT_DIR}/{BEST_CHECKPOINT} "
            f"or {LAST_CHECKPOINT}"
        )
    return found


def load_weights(model: nn.Module, state_dict: dict[str, Tensor], source: str) -> None:
    """Load a full state dict into a model, which may be sharded.

    Args:
        model: Receives the weights.
        state_dict: Full tensors by name.
        source: Where they come from, for error messages.

    Raises:
        UserError: The names or shapes do not match the model.
    """
    own = model.state_dict()
    missing, unexpected = own.keys() - state_dict.keys(), state_dict.keys() - own.keys()
    shapes = [k for k in own.keys() & state_dict.keys() if own[k].shape != state_dict[k].shape]
    if missing or unexpected or shapes:
        raise UserError(
            f"{source} comes from another architecture: {_describe_mismatch(own, state_dict)}"
        )
    if not is_distributed():
        model.load_state_dict(state_dict)
    else:
        load_full_state_dict(state_dict, model)


def _describe_mismatch(own: dict[str, Tensor], state_dict: dict[str, Tensor]) -> str:
    for name, tensor in own.items():
        if name not in state_dict:
            return f"it has no {name!r}{did_you_mean(name, state_dict)}"
        if tensor.shape != state_dict[name].shape:
            expected, found = list(tensor.shape), list(state_dict[name].shape)
            return f"{name!r} has shape {found}, but the model expects {expected}"
    return f"the model has no {join_choices(state_dict.keys() - own.keys())}"


def write_model(path: Path, model: dict[str, Tensor]) -> None:
    """Save a state dict that `torch.load` reads without this program."""
    name = path.name
    atomic_write(
        path, lambda file: write_archive(file, name, lambda inner: torch.save(model, inner))
    )


def monitor_filename(name: str) -> str:
    """Return the file name of the best checkpoint by an additional monitor."""
    return f"best-{name}.pt"


def epoch_filename(epoch: int) -> str:
    """Return the file name for the weights of one of the top k epochs."""
    return f"epoch{epoch:03d}.pt"
