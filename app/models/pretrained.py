"""The former name of `torchvision_models`, in saved runs."""

from __future__ import annotations

from typing import Any

from torch import nn

from app.models.torchvision_models import check_arguments, torchvision_model

__all__ = ["check_arguments", "pretrained"]


def pretrained(name: str, num_classes: int, weights: str | None = "DEFAULT") -> nn.Module:
    """Make a model of torchvision for color images; see `torchvision_model`.

    With weights, GoogLeNet and Inception take ImageNet's normalization, and convert it to theirs.
    """
    model: Any = torchvision_model(name, num_classes, weights=weights)
    if weights is not None and hasattr(model, "transform_input"):
        model.transform_input = True
    return model  # type: ignore[no-any-return]
