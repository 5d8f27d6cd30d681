"""Save and load checkpoints, which contain only tensors and plain Python values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor, nn

from app.distributed.collectives import is_distributed
from app.distributed.strategies import load_full_state_dict
from app.runtime.errors import UserError, did_you_mean, join_choices
from app.runtime.files import atomic_write
from app.training.checkpoint.header import CheckpointInfo
from app.training.checkpoint.rotation import SUFFIX, CheckpointRotation, find_checkpoint
from app.training.checkpoint.store import read_store, write_store
from app.training.history import Point, Row

Types = tuple[type, ...]
CONTENT_TYPES: dict[str, Types] = {
    "config": (dict, NoneType),
    "model": (dict,),
    "task": (dict,),
    "epoch": (int,),
    "history": (list,),
    "training": (dict, NoneType),
    "number": (int,),
}
TRAINING_TYPES: dict[str, Types] = {
    "optimizers": (dict,),
    "averaging": (dict,),
    "batches": (int,),
    "batches_in_epoch": (int,),
    "phase": (str,),
    "end": (str, NoneType),
    "mid_epoch": (dict, NoneType),
    "callbacks": (dict,),
    "nonfinite": (dict,),
}
MID_EPOCH_TYPES: dict[str, Types] = {"batches": (int,), "rows": (dict,), "ranks": (list,)}
CELL_TYPES = (int, float, str)  # in a row of the history


@dataclass(frozen=True)
class Checkpoint:
    """Content of a checkpoint file.

    Attributes:
        config: Configuration of the run, with references between its keys, see `app.config.saved`;
            None if the trainer was built from Python.
        model: State dict of the model, on the CPU.
        task: State of the task besides the model, such as learned loss weights.
        epoch: Last epoch trained on, counted from 1.
        history: One row for each finished stage.
        training: State of the optimizer, schedule, scaler and callbacks; None in a weights-only
            checkpoint.
        number: Sequence number of a training checkpoint within its run.
        step: Number of optimizer steps of weights, if the run validates within epochs.
    """

    config: dict[str, Any] | None
    model: dict[str, Tensor]
    task: dict[str, Any]
    epoch: int
    history: list[Row]
    training: dict[str, Any] | None
    number: int = 0
    step: int | None = None

    @property
    def info(self) -> CheckpointInfo:
        """Summary stored in the header of the file, readable without loading it."""
        kind: Literal["state", "weights"] = "weights" if self.training is None else "state"
        return CheckpointInfo(kind, self.epoch, self.number, self.step)


def save_checkpoint(
    path: Path, checkpoint: Checkpoint, rotation: CheckpointRotation | None = None
) -> None:
    """Save a checkpoint atomically, with a checksum.

    Args:
        path: Destination; a rotation always writes `last.safetensors`.
        checkpoint: What to save.
        rotation: For a training checkpoint: renames the older ones and removes the oldest.

    Raises:
        UserError: The checkpoint contains an object that is not a tensor or a plain value.
        StorageError: The file cannot be written.
    """
    content = {name: getattr(checkpoint, name) for name in CONTENT_TYPES}

    def write(file: BinaryIO) -> None:
        write_store(file, path.name, checkpoint.info, content)

    if rotation is None:
        atomic_write(path, write)
    else:
        rotation.write(write)


def load_checkpoint(path: Path) -> Checkpoint:
    """Load a checkpoint without executing anything in it.

    Args:
        path: A checkpoint file or a run folder.

    Raises:
        UserError: The checkpoint is missing, damaged, or was not written by this program.
    """
    if path.name == ".metadata" or path.suffix == ".distcp" or (path / ".metadata").exists():
        raise UserError(
            f"{path} is a torch.distributed.checkpoint, whose .metadata is a pickle that can run "
            "code; it is not read"
        )
    file = find_checkpoint(path)
    info, content = read_store(file)
    problem = find_problem(content)
    if problem is not None:
        raise UserError(f"{file} is not a checkpoint of this program: {problem}")
    return Checkpoint(**{name: content[name] for name in CONTENT_TYPES}, step=info.step)


def find_problem(content: dict[str, Any]) -> str | None:
    """Return the first entry that is missing or has the wrong type; None if there is none."""
    problem = _find_wrong_type(content, CONTENT_TYPES, "")
    if problem is not None:
        return problem
    if not all(isinstance(tensor, Tensor) for tensor in content["model"].values()):
        return "model contains more than named tensors"
    if not all(map(_is_row, content["history"])):
        return "history is not a list of rows"
    training = content["training"]
    if training is None:
        return None
    problem = _find_wrong_type(training, TRAINING_TYPES, "training.")
    if problem is not None or training["mid_epoch"] is None:
        return problem
    return _find_wrong_type(training["mid_epoch"], MID_EPOCH_TYPES, "training.mid_epoch.")


def _find_wrong_type(part: dict[Any, Any], types: dict[str, Types], prefix: str) -> str | None:
    for name, allowed in types.items():
        if name not in part:
            return f"it has no {prefix}{name}"
        value = part[name]
        if type(value) not in allowed:
            expected = " or ".join(kind.__name__ for kind in allowed)
            return f"{prefix}{name} is of type {type(value).__name__}, not {expected}"
        if type(value) is int and value < 0:
            return f"{prefix}{name}={value} is below 0"
    return None


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("epoch"), int)
        and isinstance(row.get("stage"), str)
        and all(isinstance(cell, CELL_TYPES) for cell in row.values())
    )


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
    """Save a state dict that `torch.load` reads without this program.

    Raises:
        StorageError: The file cannot be written.
    """

    def write(file: BinaryIO) -> None:
        try:
            torch.save(model, file)
        except RuntimeError as error:  # torch hides the reason why a file cannot be written
            cause: BaseException = error
            while not isinstance(cause, OSError) and cause.__context__ is not None:
                cause = cause.__context__
            raise cause from None

    atomic_write(path, write)


def monitor_filename(name: str) -> str:
    """Return the file name of the best checkpoint by an additional monitor."""
    return f"best-{name}{SUFFIX}"


def top_k_filename(point: Point) -> str:
    """Return the file name for the weights of one of the k best epochs or parts of epochs."""
    return f"{point.label}{SUFFIX}"
