"""Checkpoints: tensors and plain Python only, so that reading one executes nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from app.config.errors import UserError, nearest, one_of
from app.distributed import alone
from app.files import write_whole
from app.history import Row
from app.parallel import put
from app.plain_archive import load_plain

FORMAT = 2
KEYS = {"format", "config", "template", "model", "task", "epoch", "history", "training"}
BEST, LAST = "best.pt", "last.pt"


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
        training: States of the optimizer, schedule and scaler; None in the best checkpoint.
    """

    config: dict[str, Any] | None
    template: str | None
    model: dict[str, Tensor]
    task: dict[str, Any]
    epoch: int
    history: list[Row]
    training: dict[str, Any] | None


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Writes it whole and durably."""
    content = {
        "format": FORMAT,
        "config": json.dumps(checkpoint.config),
        "template": checkpoint.template,
        "model": checkpoint.model,
        "task": checkpoint.task,
        "epoch": checkpoint.epoch,
        "history": json.dumps(checkpoint.history),
        "training": checkpoint.training,
    }
    write_whole(path, lambda file: torch.save(content, file))


def monitored(name: str) -> str:
    """The file of the best checkpoint by a further monitor."""
    return f"best-{name}.pt"


def find_checkpoint(path: Path) -> Path:
    """The file itself, or the best checkpoint (else the last) of a run folder.

    Raises:
        UserError: There is none.
    """
    if path.is_file():
        return path
    candidates = [path / "checkpoints" / name for name in (BEST, LAST)]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        raise UserError(f"ckpt={str(path)!r} holds no checkpoint: no checkpoints/{BEST} or {LAST}")
    return found


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint; nothing in it is executed.

    Args:
        path: A file, or a run folder.

    Raises:
        UserError: It is missing, damaged, holds code, or is no checkpoint of this program.
    """
    file = find_checkpoint(path)
    content = _load_safely(file)
    if not isinstance(content, dict) or not content.keys() >= KEYS:
        raise UserError(f"{file} is no checkpoint of this program")
    if content["format"] != FORMAT:
        raise UserError(f"{file} has format {content['format']!r}; this program reads {FORMAT}")
    try:
        config, history = json.loads(content["config"]), json.loads(content["history"])
    except (TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{file} is damaged: {error}") from error
    return Checkpoint(
        config=config,
        template=content["template"],
        model=content["model"],
        task=content["task"],
        epoch=content["epoch"],
        history=history,
        training=content["training"],
    )


def _load_safely(file: Path) -> Any:
    return load_plain(file)


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
    if alone():
        model.load_state_dict(state)
    else:
        put(state, model)


def _unlike(own: dict[str, Tensor], state: dict[str, Tensor]) -> str:
    for name, tensor in own.items():
        if name not in state:
            return f"it has no {name!r}{nearest(name, state)}"
        if tensor.shape != state[name].shape:
            here, there = list(tensor.shape), list(state[name].shape)
            return f"{name!r} is of shape {there}, the model's is {here}"
    return f"the model has no {one_of(state.keys() - own.keys())}"
