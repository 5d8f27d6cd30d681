"""What the wrappers of model zoos (torchvision, timm, segmentation_models_pytorch) share.

A module of a zoo has its builder; `check_arguments`, which looks up the names before a run starts;
and perhaps `published_input`, the size and normalization of images that its weights expect.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from app.runtime.errors import UserError, did_you_mean


class PublishedInput(TypedDict):
    """The images that published weights expect.

    Attributes:
        image_size: Height and width in pixels.
        eval_crop: Part of the shorter side that evaluation sees.
        mean: Per channel, of values in [0, 1].
        std: Per channel, of values in [0, 1].
    """

    image_size: int
    eval_crop: float
    mean: list[float]
    std: list[float]


def check_name(key: str, name: str, names: Iterable[str], library: str) -> None:
    """Check that a library has a model of that name.

    Raises:
        UserError: It does not; the message has the nearest names.
    """
    allowed = set(names)
    if name not in allowed:
        close = did_you_mean(name, allowed, count=3)
        raise UserError(f"{key}={name!r} is not one of {len(allowed):,} names in {library}{close}")


def check_weights(weights: str | None, names: Iterable[str], model: str) -> None:
    """Check that a model has published weights of that name.

    Raises:
        UserError: It does not.
    """
    allowed = list(names)
    if weights is not None and weights not in allowed:
        choices = ", ".join((*allowed, "or null" if allowed else "null"))
        raise UserError(f"weights={weights!r} does not exist for {model}; allowed: {choices}")


@contextmanager
def build_errors(name: str) -> Iterator[None]:
    """Turn what the builder of a library raises into a `UserError` that names the model."""
    try:
        yield
    except UserError:
        raise
    except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"name={name!r} cannot be built like this: {reason}") from error


def first_conv(model: nn.Module) -> tuple[str, nn.Conv2d]:
    """Return the convolution that sees the images, and its name."""
    return next(
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)
    )


def adapt_first_conv(weights: dict[str, Any], model: nn.Module) -> None:
    """Fit published weights of the first convolution to the input channels of a model, in place.

    As in timm (`adapt_input_conv`): summed for one channel, else repeated and scaled, so that the
    outputs keep their magnitude.
    """
    name, conv = first_conv(model)
    kernel = weights.get(f"{name}.weight")
    if not isinstance(kernel, Tensor) or kernel.shape[1] == conv.in_channels:
        return
    published, channels = kernel.shape[1], conv.in_channels
    if channels == 1:
        kernel = kernel.sum(dim=1, keepdim=True)
    else:
        order = torch.arange(channels) % published
        kernel = kernel[:, order] * (published / channels)
    weights[f"{name}.weight"] = kernel
