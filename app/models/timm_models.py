"""Models of timm (pytorch-image-models) by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from app.models.zoo import PublishedInput, build_errors, check_name, check_weights
from app.runtime.errors import UserError
from app.runtime.extras import import_extra
from app.runtime.published_weights import HASH_IN_NAME, PublishedWeights


def timm_model(
    name: str,
    num_classes: int | None,
    in_channels: int = 3,
    image_size: int | None = None,
    weights: str | None = None,
    sha256: str | None = None,
    drop_path: float | None = None,
    dropout: float | None = None,
    global_pool: str | None = None,
) -> nn.Module:
    """Make a classification model of timm, which maps images (N, C, H, W) to logits.

    Args:
        name: Name in timm, perhaps with the tag of its weights: `resnet18`, `resnet18.a1_in1k`.
        num_classes: Number of output logits; None (regression) gives one. If the weights have
            another number, the last layer is initialized at random.
        in_channels: Channels of the images; timm adapts published weights to them.
        image_size: Height and width in pixels; only models with a fixed size depend on it.
        weights: `DEFAULT` reads the published weights of the name; None initializes at random.
        sha256: The SHA-256 of the file of weights, if timm does not know it.
        drop_path: Rate of stochastic depth; None keeps that of timm.
        dropout: Dropout probability before the last layer; None keeps that of timm.
        global_pool: Pooling before the last layer; None keeps that of timm.

    Raises:
        UserError: A name is unknown, the arguments do not fit the model, or the weights are
            damaged, or missing and cannot be downloaded, or their SHA-256 is not known.
    """
    check_arguments({"name": name, "weights": weights})
    timm = import_extra("timm", "timm")
    published = timm.get_pretrained_cfg(name)
    has_fixed_size = published is not None and published.fixed_input_size
    options: dict[str, Any] = {
        "num_classes": num_classes or 1,
        "in_chans": in_channels,
        "img_size": image_size if has_fixed_size else None,
        "drop_path_rate": drop_path,
        "drop_rate": dropout,
        "global_pool": global_pool,
    }
    if weights is not None:
        # Given the tensors, timm adapts them, and opens no file.
        content = _published_weights(name, published).load(sha256)
        options |= {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": content}}
    with build_errors(name):
        model: nn.Module = timm.create_model(name, **options)
    getattr(model, "pretrained_cfg", {}).pop("state_dict", None)  # a copy of the weights
    return model


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Look up the names of the model and of its weights.

    Only names in timm's registry exist: no path, and no repository of a hub.

    Raises:
        UserError: timm is not installed, or a name does not exist.
    """
    timm = import_extra("timm", "timm")
    name = arguments["name"]
    check_name("name", name, {*timm.list_models(), *timm.list_models(pretrained=True)}, "timm")
    published = timm.get_pretrained_cfg(name)
    has_weights = published is not None and (published.url or published.hf_hub_id)
    check_weights(arguments.get("weights"), ["DEFAULT"] if has_weights else [], name)


def published_input(arguments: Mapping[str, Any]) -> PublishedInput:
    """Return the images that the weights expect; without weights, those of the default ones."""
    name = arguments["name"]
    published = import_extra("timm", "timm").get_pretrained_cfg(name)
    if published is None:
        raise UserError(f"name={name!r} has no published weights, and so no input that they expect")
    return {
        "image_size": published.input_size[-1],
        "eval_crop": published.crop_pct,
        "mean": list(published.mean),
        "std": list(published.std),
    }


def _published_weights(name: str, published: Any) -> PublishedWeights:
    """Return the file of a model: one with a hash in its name, or else that of the hub."""
    if published.url and HASH_IN_NAME.search(published.url):
        return PublishedWeights(published.url, Path(published.url).name)
    if not published.hf_hub_id:
        raise UserError(f"the weights of {name} are a file without a known SHA-256; use others")
    url = f"https://huggingface.co/{published.hf_hub_id}/resolve/main/model.safetensors"
    return PublishedWeights(url, f"{Path(published.hf_hub_id).name}.safetensors")
