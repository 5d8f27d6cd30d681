"""Segmentation models of segmentation_models_pytorch (smp): an encoder and a decoder by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from app.models.zoo import adapt_first_conv, build_errors, check_name, check_weights
from app.runtime.errors import UserError
from app.runtime.extras import import_extra
from app.runtime.published_weights import PublishedWeights

LIBRARY = "segmentation_models_pytorch"
TIMM_PREFIX = "tu-"  # of encoders that smp takes from timm


def smp_model(
    name: str,
    num_classes: int | None,
    encoder: str = "resnet34",
    in_channels: int = 3,
    weights: str | None = None,
    sha256: str | None = None,
    drop_path: float | None = None,
) -> nn.Module:
    """Make a segmentation model, which maps images (N, C, H, W) to logits (N, num_classes, H, W).

    Args:
        name: Name of the architecture, for instance `unet` or `deeplabv3plus`.
        num_classes: Number of output channels; None (regression) gives one.
        encoder: Name of the encoder, for instance `resnet34`, or `tu-` and a name in timm.
        in_channels: Channels of the images; published kernels for 3 are summed or repeated.
        weights: Name of published weights of the encoder, such as `imagenet`; None initializes
            all weights at random.
        sha256: The SHA-256 of the file of weights, which smp does not know.
        drop_path: Rate of stochastic depth of an encoder from timm; None keeps that of timm.

    Raises:
        UserError: A name is unknown, the arguments do not fit the model, or the weights are
            damaged, or missing and cannot be downloaded, or their SHA-256 is not given.
    """
    check_arguments({"name": name, "encoder": encoder, "weights": weights})
    smp = import_extra(LIBRARY, "smp")
    if drop_path is not None and not encoder.startswith(TIMM_PREFIX):
        raise UserError(
            f"drop_path={drop_path}: only encoders from timm ({TIMM_PREFIX}...) take it"
        )
    options = {} if drop_path is None else {"drop_path_rate": drop_path}
    with build_errors(name):
        model: nn.Module = smp.create_model(
            name, encoder, None, in_channels, num_classes or 1, **options
        )
    if weights is not None:
        content = _published_weights(encoder, weights).load(sha256)
        with build_errors(name):
            adapt_first_conv(content, model.encoder)  # type: ignore[arg-type]
            model.encoder.load_state_dict(content)  # type: ignore[union-attr]
    return model


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Look up the names of the architecture, of the encoder and of its weights.

    Raises:
        UserError: smp is not installed, or a name does not exist.
    """
    smp = import_extra(LIBRARY, "smp")
    timm = import_extra("timm", "timm")
    check_name("name", arguments["name"], smp.MODEL_ARCHITECTURES_MAPPING, LIBRARY)
    encoder = arguments.get("encoder", "resnet34")
    own = smp.encoders.encoders
    if encoder not in own:
        from_timm = [f"{TIMM_PREFIX}{name}" for name in timm.list_models()]
        check_name("encoder", encoder, [*own, *from_timm], LIBRARY)
    known = own[encoder]["pretrained_settings"] if encoder in own else []
    check_weights(arguments.get("weights"), known, encoder)


def _published_weights(encoder: str, weights: str) -> PublishedWeights:
    settings = import_extra(LIBRARY, "smp").encoders.encoders[encoder]["pretrained_settings"]
    repository, revision = settings[weights]["repo_id"], settings[weights]["revision"]
    url = f"https://huggingface.co/{repository}/resolve/{revision}/model.safetensors"
    return PublishedWeights(url, f"{encoder}.{weights}-smp.safetensors")
