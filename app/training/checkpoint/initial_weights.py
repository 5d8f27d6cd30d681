"""Start a training from the weights of another one: take each tensor whose name and shape fit."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch
from torch import Tensor, nn

from app.distributed.collectives import broadcast_object, rank
from app.runtime.errors import UserError, did_you_mean, join_choices
from app.training.checkpoint.checkpoint import load_checkpoint
from app.training.checkpoint.store import read_tensors
from app.training.checkpoint.torch_file import read_torch_file
from app.training.checkpoint.weights_file import WeightsFormat, find_weights_file, read_format
from app.training.optim.freezing import matches

MAX_LINES = 20  # of the table in the log
NUM_EXAMPLES = 3  # names in an error


class Match(StrEnum):
    """What became of a tensor of the model or of the file."""

    TAKEN = "taken"
    SKIPPED = "skipped"  # by `init.skip`
    OTHER_SHAPE = "other shape"
    MISSING = "missing"  # in the file
    UNUSED = "unused"  # the model has no tensor of this name


@dataclass(frozen=True)
class TensorMatch:
    """A tensor of the model, of the file, or of both; a shape is None where there is none."""

    name: str
    match: Match
    model_shape: list[int] | None
    file_shape: list[int] | None


@dataclass(frozen=True)
class InitialWeights:
    """Where the initial weights of a model come from, and which were taken.

    Attributes:
        file: File of the weights.
        sha256: Hash of the file.
        tensors: Tensors of the model in their order, then those of the file that it does not have.
    """

    file: Path
    sha256: str
    tensors: list[TensorMatch]

    @property
    def record(self) -> dict[str, str | int]:
        """What identifies the weights, for `environment.json`."""
        return {"weights": str(self.file), "sha256": self.sha256, **self.counts}

    @property
    def counts(self) -> dict[str, int]:
        """Number of tensors by what became of them."""
        return dict(Counter(str(tensor.match) for tensor in self.tensors))

    def describe(self) -> str:
        """Return a table for the log: the counts, and each tensor that was not taken."""
        counts = ", ".join(f"{count} {match}" for match, count in self.counts.items())
        others = [tensor for tensor in self.tensors if tensor.match is not Match.TAKEN]
        lines = [f"  {tensor.match:11} {_describe_shapes(tensor)}" for tensor in others]
        rest = [f"  and {len(lines) - MAX_LINES} more"] if len(lines) > MAX_LINES else []
        head = f"initial weights: {counts} (tensors of {self.file}, SHA-256 {self.sha256})"
        return "\n".join([head, *lines[:MAX_LINES], *rest])


def _describe_shapes(tensor: TensorMatch) -> str:
    shapes = {"in the file": tensor.file_shape, "in the model": tensor.model_shape}
    known = ", ".join(f"{shape} {where}" for where, shape in shapes.items() if shape is not None)
    return f"{tensor.name}: {known}"


def load_initial_weights(model: nn.Module, path: Path, skip: Sequence[str]) -> InitialWeights:
    """Load the tensors of a file whose names and shapes fit the model; all ranks must call this.

    Args:
        model: Receives the weights.
        path: A run folder, a checkpoint, or another file of weights.
        skip: Patterns of names to leave out, as in `app.training.optim.freezing.matches`.

    Raises:
        UserError: The file cannot be read, no tensor fits, or a pattern matches nothing.
    """
    file, sha256, given = broadcast_object(_read(path) if rank() == 0 else (path, "", {}))
    own = {n: t for n, t in model.state_dict().items() if isinstance(t, Tensor)}
    given = strip_wrappers(given, own)
    _check_skip(skip, [*own, *given], file)
    tensors = [_match(name, own.get(name), given.get(name), skip) for name in {**own, **given}]
    taken = [tensor.name for tensor in tensors if tensor.match is Match.TAKEN]
    if not taken:
        raise UserError(
            f"init.weights={str(file)!r}: no tensor fits the model; the file has "
            f"{_examples(given)}; the model has {_examples(own)}"
        )
    with torch.no_grad():
        for name in taken:
            own[name].copy_(given[name])
    return InitialWeights(file, sha256, tensors)


def _read(path: Path) -> tuple[Path, str, dict[str, Tensor]]:
    file = find_weights_file(path)
    with file.open("rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    return file, sha256, read_weights(file)


def read_weights(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file of weights, on the CPU, without executing anything in it.

    Raises:
        UserError: The file is damaged, or contains anything but weights.
    """
    match read_format(file):
        case WeightsFormat.CHECKPOINT:
            return load_checkpoint(file).model
        case WeightsFormat.SAFETENSORS:
            return read_tensors(file)
        case WeightsFormat.TORCH:
            return read_torch_file(file)


def strip_wrappers(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove from names what wrappers of a model add.

    These are `_orig_mod.` of `torch.compile`, and a prefix of all names, such as `module.` of
    `DistributedDataParallel` or the attribute of a `LightningModule`, if no name fits with it.

    Args:
        given: Tensors by name.
        own: Tensors of the model, by name.
    """
    named = {name.replace("_orig_mod.", ""): tensor for name, tensor in given.items()}
    stripped = named
    while not own.keys() & stripped and (prefix := _shared_prefix(stripped)):
        stripped = {name.removeprefix(prefix): tensor for name, tensor in stripped.items()}
    return stripped if own.keys() & stripped else named


def _shared_prefix(names: Mapping[str, Tensor]) -> str:
    """Return the first part of all names, such as `module.`; empty if they differ."""
    parts = {name.partition(".")[0] if "." in name else "" for name in names}
    part = parts.pop() if len(parts) == 1 else ""
    return f"{part}." if part else ""


def _match(name: str, own: Tensor | None, given: Tensor | None, skip: Sequence[str]) -> TensorMatch:
    shapes = [None if tensor is None else list(tensor.shape) for tensor in (own, given)]
    if any(matches(name, pattern) for pattern in skip):
        match = Match.SKIPPED
    elif own is None:
        match = Match.UNUSED
    elif given is None:
        match = Match.MISSING
    else:
        match = Match.TAKEN if shapes[0] == shapes[1] else Match.OTHER_SHAPE
    return TensorMatch(name, match, *shapes)


def _check_skip(skip: Sequence[str], names: Sequence[str], file: Path) -> None:
    for pattern in skip:
        if not any(matches(name, pattern) for name in names):
            parts = sorted({name.rpartition(".")[0] for name in names} - {""}) or names
            raise UserError(
                f"init.skip={pattern!r} matches no tensor of the model or of {file}; "
                f"parts: {join_choices(parts)}{did_you_mean(pattern, parts)}"
            )


def _examples(tensors: Mapping[str, Tensor]) -> str:
    names = [f"{name} {list(t.shape)}" for name, t in list(tensors.items())[:NUM_EXAMPLES]]
    rest = ", ..." if len(tensors) > NUM_EXAMPLES else ""
    return f"{', '.join(names)}{rest}" if names else "no tensors"
