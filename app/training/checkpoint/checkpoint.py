"""Checkpoints: tensors and plain Python only, so that reading one executes nothing."""

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
from app.runtime.errors import UserError, nearest, one_of
from app.runtime.files import atomic_write
from app.training.checkpoint.archive_reader import load_plain, refuse_distributed
from app.training.checkpoint.checksum import (
    CheckpointInfo,
    verify_checksum,
    write_archive,
    write_with_checksum,
)
from app.training.checkpoint.content_check import check_content
from app.training.checkpoint.rotation import CHECKPOINT_DIR, LAST_CHECKPOINT, CheckpointRotation, list_checkpoints
from app.training.history import Row

FORMAT_VERSION = 3
BEST_CHECKPOINT = "best.pt"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        config: Of the run, resolved; None where the trainer was built from Python.
        template: The same as YAML with its interpolations.
        model: The model's state dict, on the host.
        task: What the task has beside the model, as learned weights of the loss.
        epoch: The last one whose learning is in it; counted from 1.
        history: Rows of the stages so far.
        training: States of the optimizer, schedule and scaler; None where it is weights alone.
        number: Of a state among those of the run.
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
        """What can be known of it without reading it."""
        kind: Literal["state", "weights"] = "weights" if self.training is None else "state"
        return CheckpointInfo(kind, self.epoch, self.number)


def save_checkpoint(
    path: Path, checkpoint: Checkpoint, rotation: CheckpointRotation | None = None
) -> None:
    """Writes it whole, durably and with a checksum.

    Args:
        path: The file, for weights alone.
        checkpoint: What is saved.
        states: Where it is one to go on from: those that are there already.
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


def write_model(path: Path, model: dict[str, Tensor]) -> None:
    """A state dict for torch alone."""
    name = path.name
    atomic_write(
        path, lambda file: write_archive(file, name, lambda inner: torch.save(model, inner))
    )


def monitor_filename(name: str) -> str:
    """The file of the best checkpoint by a further monitor."""
    return f"best-{name}.pt"


def epoch_filename(epoch: int) -> str:
    """The file of the weights of an epoch that is among the best."""
    return f"epoch{epoch:03d}.pt"


def find_checkpoint(path: Path) -> Path:
    """The file itself, or the best checkpoint (else the last) of a run folder.

    Raises:
        UserError: There is none.
    """
    if path.is_file():
        return path
    candidates = [path / CHECKPOINT_DIR / BEST_CHECKPOINT, *list_checkpoints(path)]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        raise UserError(f"ckpt={str(path)!r} holds no checkpoint: no {CHECKPOINT_DIR}/{BEST_CHECKPOINT} or {LAST_CHECKPOINT}")
    return found


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint; nothing in it is executed.

    Args:
        path: A file, or a run folder.

    Raises:
        UserError: It is missing, damaged, holds code, or is no checkpoint of this program.
    """
    refuse_distributed(path)
    file = find_checkpoint(path)
    verify_checksum(file)
    content = load_plain(file)
    if not isinstance(content, dict) or "format" not in content:
        raise UserError(f"{file} is no checkpoint of this program")
    if content["format"] != FORMAT_VERSION:
        raise UserError(f"{file} has format {content['format']!r}; this program reads {FORMAT_VERSION}")
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


def load_weights(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Puts a state dict into a model.

    Raises:
        UserError: It is that of another architecture.
    """
    own = model.state_dict()
    missing, foreign = own.keys() - state.keys(), state.keys() - own.keys()
    shapes = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    if missing or foreign or shapes:
        raise UserError(f"{source} is of another architecture: {_unlike(own, state)}")
    if not is_distributed():
        model.load_state_dict(state)
    else:
        load_full_state_dict(state, model)


def _unlike(own: dict[str, Tensor], state: dict[str, Tensor]) -> str:
    for name, tensor in own.items():
        if name not in state:
            return f"it has no {name!r}{nearest(name, state)}"
        if tensor.shape != state[name].shape:
            here, there = list(tensor.shape), list(state[name].shape)
            return f"{name!r} is of shape {there}, the model's is {here}"
    return f"the model has no {one_of(state.keys() - own.keys())}"
