"""Models of torchvision with weights learned elsewhere, and a last layer for one's own classes."""

from __future__ import annotations

import hashlib
import pickle
import re
from pathlib import Path

import torch
from torch import nn
from torchvision import models
from torchvision.models import WeightsEnum


def pretrained(name: str, num_classes: int, weights: str | None = "DEFAULT") -> nn.Module:
    """A classification model whose last linear layer is a new one; all names are torchvision's.

    Args:
        name: As in `torchvision.models`, for instance `resnet18`.
        num_classes: Length of the output.
        weights: A name among those that torchvision has of the model, as `DEFAULT` or
            `IMAGENET1K_V1`; read from the folder `checkpoints` of torch.hub, into which they are
            downloaded where they are not there. None draws all weights.

    Raises:
        ValueError: There is no such model, its last layer is not linear, or its weights are not
            there and cannot be downloaded.
    """
    if name not in models.list_models(module=models):
        raise ValueError(
            f"name={name!r} is no classification model of torchvision.models, as resnet18 is"
        )
    model = models.get_model(name) if weights is None else _with_weights(name, weights)
    linear = {place: part for place, part in model.named_modules() if isinstance(part, nn.Linear)}
    if not linear:
        raise ValueError(f"name={name!r} has no linear layer that could be replaced")
    place, last = list(linear.items())[-1]
    model.set_submodule(place, nn.Linear(last.in_features, num_classes, last.bias is not None))
    return model


def _with_weights(name: str, weights: str) -> nn.Module:
    chosen = _chosen(name, weights)
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(chosen.url).name
    _check_hash(file)
    try:
        model: nn.Module = models.get_model(name, weights=chosen)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        state = "is damaged or of another model" if file.is_file() else "cannot be downloaded"
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"weights={weights!r}: {file.name} {state} ({reason}); put {chosen.url} into "
            f"{file.parent}, or give weights=null"
        ) from error
    return model


def _check_hash(file: Path) -> None:
    """It is a pickle, and torch.hub looks at the hash in its name only when it downloads it."""
    expected = re.search(r"-([0-9a-f]{8,})\.", file.name)
    if file.is_file() and expected:
        with file.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if not found.startswith(expected[1]):
            raise ValueError(
                f"{file} is damaged or another: its SHA-256 begins with {found[:8]}; delete it"
            )


def _chosen(name: str, weights: str) -> WeightsEnum:
    offered = models.get_model_weights(name)
    if weights not in offered.__members__:
        raise ValueError(
            f"weights={weights!r} is not known of {name}; allowed: "
            f"{', '.join(offered.__members__)}, or null"
        )
    return offered[weights]
