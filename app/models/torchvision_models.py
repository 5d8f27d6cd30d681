"""Models of torchvision for classification, segmentation and detection, by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchvision import models
from torchvision.models import WeightsEnum
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings
from torchvision.ops import StochasticDepth

from app.models.detector import Detector, freeze_batchnorm
from app.models.zoo import (
    PublishedInput,
    adapt_first_conv,
    build_errors,
    check_name,
    check_weights,
    first_conv,
)
from app.runtime.errors import UserError
from app.runtime.published_weights import PublishedWeights

INCEPTIONS = ("googlenet", "inception_v3")
DETECTORS = ("fasterrcnn", "fcos", "retinanet", "ssd")  # not those of masks and keypoints
HAS_BACKGROUND = ("fasterrcnn", "ssd")  # as class 0
BACKBONES = ("mobilenet_v3_large", "resnet50")  # of detectors with a feature pyramid
# Their published weights were trained with an eps of 0 in the frozen batch norms.
OLD_EPS = ("fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn")
# Height and width, mean and std that detectors expect, where they are not 800 and ImageNet's.
SSD_INPUTS: dict[str, PublishedInput] = {
    "ssd300_vgg16": {
        "image_size": 300,
        "eval_crop": 1.0,
        "mean": [0.48235, 0.45882, 0.40784],
        "std": [1.0 / 255.0] * 3,
    },
    "ssdlite320_mobilenet_v3_large": {
        "image_size": 320,
        "eval_crop": 1.0,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    },
}
AUXILIARY = re.compile(r"(aux1|aux2|AuxLogits|aux_classifier)\.")  # heads used by no task here
# torchvision's densenet.py renames these parts of its files in the same way.
OLD_DENSENET_NAME = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")


def torchvision_model(
    name: str,
    num_classes: int | None,
    in_channels: int = 3,
    image_size: int | None = None,
    weights: str | None = None,
    drop_path: float | None = None,
    weights_backbone: str | None = None,
) -> nn.Module:
    """Make a model of `torchvision.models`, its `segmentation` or its `detection`.

    It maps images (N, C, H, W) to logits (N, num_classes) or (N, num_classes, H, W); or it is an
    `app.models.detector.Detector`, which finds boxes.

    Args:
        name: For instance `resnet18`, `deeplabv3_resnet50` or `fasterrcnn_resnet50_fpn`.
        num_classes: Number of classes, without a background of detectors; None (regression) gives
            one. If the weights have another number, the last layer is initialized at random.
        in_channels: Channels of the images; published kernels for 3 are summed or repeated.
        image_size: Height and width in pixels; only vision transformers, MaxViT and SSD depend on
            it.
        weights: Name of published weights, such as `DEFAULT` or `IMAGENET1K_V1`; None initializes
            all weights at random.
        drop_path: Highest rate of stochastic depth; None keeps that of torchvision.
        weights_backbone: Name of published weights of a classifier, for the backbone of a detector.

    Raises:
        UserError: A name is unknown, the arguments do not fit the model, or the weights are
            damaged, or missing and cannot be downloaded.
    """
    check_arguments({"name": name, "weights": weights, "weights_backbone": weights_backbone})
    num_outputs = (num_classes or 1) + name.startswith(HAS_BACKGROUND)
    with build_errors(name):
        model: nn.Module = models.get_model(
            name, num_classes=num_outputs, **_options(name, image_size)
        )
        if in_channels != 3:
            _replace_first_conv(model, in_channels)
        if drop_path is not None:
            _set_drop_path(model, drop_path)
    if weights is not None:
        _load_weights(model, name, _weights_of(name)[weights])
    if weights_backbone is not None:
        _load_backbone(model, name, _weights_of(_backbone(name))[weights_backbone])
    if _is_detection(name):
        has_fixed_statistics = not name.endswith("_v2") and not name.startswith("ssd")
        if has_fixed_statistics and (weights or weights_backbone):  # as torchvision's builders
            eps = 0.0 if weights and name in OLD_EPS else None
            freeze_batchnorm(model.get_submodule("backbone.body"), eps)
        return Detector(model, first_label=int(name.startswith(HAS_BACKGROUND)))
    return _SegmentationLogits(model) if _is_segmentation(name) else model


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Look up the names of the model and of its weights.

    Raises:
        UserError: One does not exist.
    """
    name, weights_backbone = arguments["name"], arguments.get("weights_backbone")
    segmentation = models.list_models(module=models.segmentation)
    names = [*models.list_models(module=models), *segmentation, *_detectors()]
    check_name("name", name, names, "torchvision")
    check_weights(arguments.get("weights"), _weights_of(name), name)
    if weights_backbone is None:
        return
    if not _backbone(name):
        raise UserError(f"weights_backbone={weights_backbone!r} is not for {name}; allowed: null")
    check_weights(weights_backbone, _weights_of(_backbone(name)), f"the backbone of {name}")
    if arguments.get("weights") is not None:
        raise UserError("weights and weights_backbone are both set; allowed: one of them")


def published_input(arguments: Mapping[str, Any]) -> PublishedInput:
    """Return the images that the weights expect; without weights, those of the default ones."""
    name = arguments["name"]
    if _is_detection(name):
        imagenet = models.ResNet50_Weights.IMAGENET1K_V1.transforms()
        mean, std = list(imagenet.mean), list(imagenet.std)
        fpn: PublishedInput = {"image_size": 800, "eval_crop": 1.0, "mean": mean, "std": std}
        return SSD_INPUTS.get(name, fpn | {"image_size": 320} if "_320_" in name else fpn)
    preset: Any = _weights_of(name)[arguments.get("weights") or "DEFAULT"].transforms()
    resized = preset.resize_size[0]
    size = resized if _is_segmentation(name) else preset.crop_size[0]
    mean, std = list(preset.mean), list(preset.std)
    if name in INCEPTIONS:  # trained with these, to which torchvision converts inside of the model
        mean, std = [0.5] * 3, [0.5] * 3
    return {"image_size": size, "eval_crop": size / resized, "mean": mean, "std": std}


def _is_segmentation(name: str) -> bool:
    return name in models.list_models(module=models.segmentation)


def _detectors() -> list[str]:
    names = models.list_models(module=models.detection)
    return [name for name in names if name.startswith(DETECTORS)]


def _is_detection(name: str) -> bool:
    return name in _detectors()


def _backbone(name: str) -> str:
    """Return the name of the classifier that the backbone of a detector comes from; else empty."""
    is_known = _is_detection(name) and name.endswith(("_fpn", "_fpn_v2"))
    return next((known for known in BACKBONES if is_known and known in name), "")


def _weights_of(name: str) -> dict[str, WeightsEnum]:
    """Return the published weights of a model; without those of its features only."""
    members = models.get_model_weights(name).__members__
    return {key: entry for key, entry in members.items() if entry.meta["categories"]}


def _options(name: str, image_size: int | None) -> dict[str, Any]:
    if name in SSD_INPUTS and image_size not in (None, SSD_INPUTS[name]["image_size"]):
        size = SSD_INPUTS[name]["image_size"]
        raise UserError(
            f"name={name!r} has anchors for images of {size} pixels, but image_size={image_size}; "
            f"allowed: data.image_size={size}"
        )
    if _is_segmentation(name) or _is_detection(name):
        return {"weights_backbone": None}
    if name in INCEPTIONS:
        return {"aux_logits": False, "init_weights": True}
    if image_size is not None and name.startswith("vit_"):
        return {"image_size": image_size}
    if image_size is not None and name.startswith("maxvit"):
        return {"input_size": (image_size, image_size)}
    return {}


def _replace_first_conv(model: nn.Module, in_channels: int) -> None:
    name, conv = first_conv(model)
    new = nn.Conv2d(
        in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        bias=conv.bias is not None,
    )
    model.set_submodule(name, new)


def _set_drop_path(model: nn.Module, rate: float) -> None:
    """Scale the rates of stochastic depth, which rise from layer to layer."""
    layers = [module for module in model.modules() if isinstance(module, StochasticDepth)]
    highest = max((layer.p for layer in layers), default=0)
    if not highest:
        raise UserError(f"drop_path={rate}: this model has no stochastic depth; allowed: null")
    if not 0 <= rate < 1:
        raise UserError(f"drop_path={rate} is not valid; allowed: at least 0, and below 1")
    for layer in layers:
        layer.p *= rate / highest


def _load_weights(model: nn.Module, name: str, entry: WeightsEnum) -> None:
    weights = PublishedWeights(entry.url, Path(entry.url).name).load()
    for key in [*weights]:
        weights[OLD_DENSENET_NAME.sub(r"\1\2", key)] = weights.pop(key)
    for key in filter(AUXILIARY.match, [*weights]):
        del weights[key]
    with build_errors(name):
        adapt_first_conv(weights, model)
        if isinstance(model, VisionTransformer):
            weights = interpolate_embeddings(model.image_size, model.patch_size, weights)
        head = _pop_other_head(weights, model, len(entry.meta["categories"]))
        result = model.load_state_dict(weights, strict=False)
    if result.unexpected_keys or {*result.missing_keys} != head:
        raise UserError(f"{Path(entry.url).name} belongs to another model than {name}")


def _load_backbone(model: nn.Module, name: str, entry: WeightsEnum) -> None:
    """Load the features of a classifier into the backbone of a detector with a feature pyramid."""
    weights = PublishedWeights(entry.url, Path(entry.url).name).load()
    weights = {key.removeprefix("features."): value for key, value in weights.items()}
    body = model.get_submodule("backbone.body")
    with build_errors(name):
        adapt_first_conv(weights, body)
        result = body.load_state_dict(weights, strict=False)
    if result.missing_keys:
        raise UserError(f"{Path(entry.url).name} belongs to another model than {_backbone(name)}")


def _pop_other_head(weights: dict[str, Any], model: nn.Module, num_classes: int) -> set[str]:
    """Remove the tensors of the last layers, if the model has another number of classes.

    They have a row, or several, for each of the published classes.
    """
    names = {
        name
        for name, tensor in model.state_dict().items()
        if name in weights
        and weights[name].shape != tensor.shape
        and weights[name].shape[1:] == tensor.shape[1:]
        and len(weights[name]) % num_classes == 0
    }
    for name in names:
        del weights[name]
    return names


class _SegmentationLogits(nn.Module):
    """Returns the logits of a segmentation model of torchvision, which returns a dict."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Map images of shape (N, C, H, W) to logits of shape (N, num_classes, H, W)."""
        logits: Tensor = self.model(images)["out"]
        return logits
