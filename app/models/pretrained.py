"""Models of torchvision with pretrained weights and a new classification layer."""

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
    """Make a torchvision classification model and replace its last linear layer.

    Args:
        name: Name in `torchvision.models`, for instance `resnet18`.
        num_classes: Number of output logits.
        weights: Name of the weights in torchvision, such as `DEFAULT` or `IMAGENET1K_V1`; they are
            read from the folder `checkpoints` of torch.hub, and downloaded if they are missing.
            None initializes all weights at random.

    Raises:
        ValueError: The model does not exist or has no linear layer, or its weights are unknown,
            damaged, or missing and cannot be downloaded.
    """
    if name not in models.list_models(module=models):
        raise ValueError(
            f"name={name!r} is not a classification model of torchvision.models; "
            "for example resnet18"
        )
    model = models.get_model(name) if weights is None else _load_pretrained(name, weights)
    linear_layers = {
        path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    if not linear_layers:
        raise ValueError(f"name={name!r} has no linear layer that could be replaced")
    path, last = list(linear_layers.items())[-1]
    model.set_submodule(path, nn.Linear(last.in_features, num_classes, last.bias is not None))
    return model


def _load_pretrained(name: str, weights: str) -> nn.Module:
    entry = _find_weights(name, weights)
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(entry.url).name
    _check_hash(file)
    try:
        model: nn.Module = models.get_model(name, weights=entry)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        problem = (
            "is damaged or belongs to another model" if file.is_file() else "cannot be downloaded"
        )
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"weights={weights!r}: {file.name} {problem} ({reason}); put {entry.url} into "
            f"{file.parent}, or give weights=null"
        ) from error
    return model


def _find_weights(name: str, weights: str) -> WeightsEnum:
    available = models.get_model_weights(name)
    if weights not in available.__members__:
        raise ValueError(
            f"weights={weights!r} does not exist for {name}; allowed: "
            f"{', '.join(available.__members__)}, or null"
        )
    return available[weights]


def _check_hash(file: Path) -> None:
    # The file is a pickle, and torch.hub checks the hash in its name only after a download.
    expected = re.search(r"-([0-9a-f]{8,})\.", file.name)
    if file.is_file() and expected:
        with file.open("rb") as content:
            actual = hashlib.file_digest(content, "sha256").hexdigest()
        if not actual.startswith(expected[1]):
            raise ValueError(
                f"{file} is damaged or a different file: its SHA-256 begins with {actual[:8]}; "
                "delete it"
            )
