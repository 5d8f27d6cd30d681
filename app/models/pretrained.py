"""The former name of `torchvision_models`, in saved runs."""

from __future__ import annotations

from torch import nn

from app.models.torchvision_models import check_arguments, torchvision_model

__all__ = ["check_arguments", "pretrained"]


def pretrained(name: str, num_classes: int, weights: str | None = "DEFAULT") -> nn.Module:
    """Make a model of torchvision for color images; see `torchvision_model`."""
    return torchvision_model(name, num_classes, weights=weights)
