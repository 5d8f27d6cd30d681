"""Segmentation models of segmentation_models_pytorch by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from app.models.smp_models import smp_model
from app.runtime.errors import UserError
from tests.support.published_weights import hub_folder, random_tensors, sha256_of

__all__ = ["hub_folder"]
smp = pytest.importorskip("segmentation_models_pytorch", reason="needs the extra smp")


@pytest.mark.parametrize(
    ("name", "encoder"),
    [("unet", "resnet18"), ("deeplabv3plus", "resnet18"), ("fpn", "tu-convnext_atto")],
)
def test_smp_model_gives_logits_of_gray_images(name: str, encoder: str) -> None:
    with torch.device("meta"):
        outputs = smp_model(name, 5, encoder, in_channels=1)(torch.rand(2, 1, 64, 64))
    assert outputs.shape == (2, 5, 64, 64)


def test_drop_path_reaches_encoder_from_timm() -> None:
    with torch.device("meta"):
        model: Any = smp_model("unet", 5, "tu-convnext_atto", drop_path=0.3)
    rates = [module.drop_prob for module in model.modules() if hasattr(module, "drop_prob")]
    assert max(rates) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "unett"}, "name='unett' is not one of .*; did you mean 'unet'"),
        ({"encoder": "resnt34"}, "encoder='resnt34' .*; did you mean 'resnet34', 'tu-resnet34'"),
        ({"encoder": "tu-hf_hub:evil/model"}, "is not one of"),
        ({"encoder": "tu-hf-hub:evil/model"}, "is not one of"),
        ({"encoder": "tu-local-dir:/tmp/model"}, "is not one of"),
        ({"weights": "imagnet"}, "does not exist for resnet34; allowed: imagenet, or null"),
        ({"encoder": "tu-resnet18", "weights": "imagenet"}, "allowed: null"),
        ({"drop_path": 0.1}, r"drop_path=0\.1: only encoders from timm"),
        ({"name": "dpt"}, "name='dpt' cannot be built like this"),
        ({"weights": "imagenet"}, r"smp-hub/resnet34\.imagenet/resolve/\w{40}/model\.safetensors"),
    ],
)
def test_smp_model_refuses_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        smp_model(**{"name": "unet", "num_classes": 5} | arguments)


@pytest.mark.parametrize("channels", [1, 3])
def test_weights_of_encoder_are_read_by_hash(channels: int, hub_folder: Path) -> None:
    encoder = smp.encoders.get_encoder("mobilenet_v2", weights=None)
    tensors = random_tensors(encoder.state_dict())
    file = hub_folder / "mobilenet_v2.imagenet-smp.safetensors"
    save_file(tensors, file)
    arguments = {"weights": "imagenet", "sha256": sha256_of(file), "in_channels": channels}
    model: Any = smp_model("unet", 5, "mobilenet_v2", **arguments)
    state = model.encoder.state_dict()
    first = state.pop("features.0.0.weight")
    expected = tensors["features.0.0.weight"]
    assert torch.equal(first, expected if channels == 3 else expected.sum(1, keepdim=True))
    assert all(torch.equal(tensors[name], tensor) for name, tensor in state.items())


def test_weights_of_another_encoder_are_refused(hub_folder: Path) -> None:
    file = hub_folder / "resnet18.imagenet-smp.safetensors"
    save_file({"weight": torch.zeros(1)}, file)
    with pytest.raises(UserError, match=r"cannot be built like this: RuntimeError: Error\(s\) in"):
        smp_model("unet", 5, "resnet18", weights="imagenet", sha256=sha256_of(file))
