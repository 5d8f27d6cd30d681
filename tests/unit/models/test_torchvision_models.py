"""Models of torchvision by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor
from torchvision.ops import StochasticDepth

from app.config.allowlist import locate, signature_parameters
from app.config.instantiate import Instantiator
from app.experiment.factory import ZOO_MODELS, make_model
from app.models import torchvision_models
from app.models.pretrained import pretrained
from app.models.torchvision_models import published_input, torchvision_model
from app.runtime.errors import UserError
from app.runtime.published_weights import PublishedWeights
from tests.support.published_weights import hub_folder, random_tensors, save_with_hash
from tests.support.runs import job_for

__all__ = ["hub_folder"]
Publish = Callable[[str, dict[str, Tensor]], None]


@pytest.fixture
def publish(hub_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Publish:
    """Function that registers tensors as the published weights of a model of 1,000 classes."""

    def register(name: str, tensors: dict[str, Tensor]) -> None:
        file = save_with_hash(tensors, hub_folder, name)
        meta = {"categories": ["class"] * 1000}
        entry = SimpleNamespace(url=f"http://127.0.0.1:1/{file.name}", meta=meta)
        monkeypatch.setattr(torchvision_models, "_weights_of", lambda _: {"DEFAULT": entry})

    return register


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("resnet18", "fc"),
        ("alexnet", "classifier.6"),
        ("mobilenet_v3_small", "classifier.3"),
        ("densenet121", "classifier"),
        ("squeezenet1_1", "classifier.1"),
        ("swin_t", "head"),
        ("vit_b_16", "heads.head"),
    ],
)
def test_torchvision_model_has_names_of_torchvision(name: str, path: str) -> None:
    with torch.device("meta"):  # allocates no weights
        reference, model = torchvision.models.get_model(name), torchvision_model(name, 7)
    assert model.get_submodule(path).weight.shape[0] == 7
    assert list(model.state_dict()) == list(reference.state_dict())


@pytest.mark.parametrize(
    ("name", "size", "shape"),
    [
        ("resnet18", 32, (2, 7)),
        ("googlenet", 64, (2, 7)),  # in training it would return auxiliary outputs, too
        ("maxvit_t", 224, (2, 7)),
        ("vit_b_16", 32, (2, 7)),
        ("deeplabv3_mobilenet_v3_large", 32, (2, 7, 32, 32)),
        ("lraspp_mobilenet_v3_large", 32, (2, 7, 32, 32)),
    ],
)
def test_torchvision_model_of_gray_images_gives_logits(
    name: str, size: int, shape: tuple[int, ...]
) -> None:
    with torch.device("meta"):
        model = torchvision_model(name, 7, in_channels=1, image_size=size)
        assert model(torch.rand(2, 1, size, size)).shape == shape


def test_drop_path_scales_rates_of_stochastic_depth() -> None:
    with torch.device("meta"):
        default = torchvision_model("swin_t", 7)
        model = torchvision_model("swin_t", 7, drop_path=0.5)
    before, after = (
        [module.p for module in m.modules() if isinstance(module, StochasticDepth)]
        for m in (default, model)
    )
    assert max(before) == 0.2
    assert after == pytest.approx([p * 2.5 for p in before])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet81"}, "name='resnet81' is not one of .*did you mean 'resnet18', '"),
        ({"name": "../resnet18"}, "is not one of"),
        ({"name": "maskrcnn_resnet50_fpn"}, "is not one of 95 names in torchvision"),
        ({"weights": "V3"}, "weights='V3' .* resnet18; allowed: IMAGENET1K_V1, DEFAULT, or null"),
        ({"name": "vgg16", "weights": "IMAGENET1K_FEATURES"}, "does not exist for vgg16"),
        ({"drop_path": 0.1}, r"drop_path=0\.1: this model has no stochastic depth"),
        ({"name": "swin_t", "drop_path": 1.5}, r"drop_path=1\.5 is not valid"),
        ({"name": "vit_b_16", "image_size": 30}, "name='vit_b_16' cannot be built like this: "),
    ],
)
def test_torchvision_model_refuses_arguments(arguments: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(UserError, match=message):
        torchvision_model(**{"name": "resnet18", "num_classes": 7} | arguments)


@pytest.mark.parametrize(
    ("name", "head"), [("shufflenet_v2_x0_5", "fc."), ("squeezenet1_1", "classifier.1.")]
)
def test_weights_replace_all_but_last_layer_of_other_classes(
    name: str, head: str, publish: Publish
) -> None:
    tensors = random_tensors(torchvision.models.get_model(name).state_dict())
    publish(name, tensors)
    same, other = (torchvision_model(name, n, weights="DEFAULT").state_dict() for n in (1000, 7))
    assert all(torch.equal(same[n], tensor) for n, tensor in tensors.items())
    new = [n for n, tensor in tensors.items() if not torch.equal(other[n], tensor)]
    assert new == [n for n in tensors if n.startswith(head)]
    assert torch.equal(pretrained(name, 1000).state_dict()[new[0]], tensors[new[0]])


@pytest.mark.parametrize("channels", [1, 4])
def test_weights_for_color_fit_other_channels(channels: int, publish: Publish) -> None:
    tensors = random_tensors(torchvision.models.squeezenet1_1().state_dict())
    publish("squeezenet1_1", tensors)
    model = torchvision_model("squeezenet1_1", 7, in_channels=channels, weights="DEFAULT")
    kernel, published = model.state_dict()["features.0.weight"], tensors["features.0.weight"]
    expected = published.sum(1, True) if channels == 1 else published[:, [0, 1, 2, 0]] * 0.75
    assert torch.equal(kernel, expected)


@pytest.mark.parametrize(
    ("name", "renamed"),
    [
        ("googlenet", ("", "")),  # its file has auxiliary heads
        ("deeplabv3_mobilenet_v3_large", ("", "")),
        ("densenet121", ("norm1.", "norm.1.")),
        ("vit_b_16", ("", "")),
    ],
)
def test_weights_in_the_format_of_torchvision_are_read(
    name: str, renamed: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"init_weights": False} if name == "googlenet" else {}
    if name.startswith("deeplab"):
        options = {"aux_loss": True, "num_classes": 21, "weights_backbone": None}
    with torch.device("meta"):  # the files would be large
        published = torchvision.models.get_model(name, **options)
        content = {n.replace(*renamed): tensor for n, tensor in published.state_dict().items()}
        monkeypatch.setattr(torchvision_models.PublishedWeights, "load", lambda _: dict(content))
        model = torchvision_model(name, 7, image_size=32, weights="DEFAULT")
        if name == "googlenet":
            assert pretrained(name, 7).transform_input is True
            assert model.transform_input is False
    if name == "vit_b_16":  # interpolated from 14 x 14 patches to 2 x 2
        assert model.state_dict()["encoder.pos_embedding"].shape == (1, 5, 768)


def test_weights_of_another_model_are_refused(publish: Publish) -> None:
    publish("resnet18", {"fc.weight": torch.zeros(1000, 512)})
    with pytest.raises(UserError, match="belongs to another model than resnet18"):
        torchvision_model("resnet18", 7, weights="DEFAULT")
    publish("resnet18", {"conv1.weight": torch.zeros(64, 3, 1, 1)})
    with pytest.raises(UserError, match=r"cannot be built like this: .*Error\(s\) in loading"):
        torchvision_model("resnet18", 7, weights="DEFAULT")


def test_published_input_is_that_of_the_weights() -> None:
    def size_and_mean(**arguments: Any) -> tuple[int, float, float]:
        found = published_input(arguments)
        return found["image_size"], round(found["eval_crop"], 3), found["mean"][0]

    assert size_and_mean(name="resnet18") == (224, 0.875, 0.485)
    assert size_and_mean(name="inception_v3") == (299, 0.874, 0.5)
    assert size_and_mean(name="fcn_resnet50") == (520, 1, 0.485)
    weights = "IMAGENET1K_SWAG_E2E_V1"
    assert size_and_mean(name="vit_b_16", weights=weights) == (384, 1, 0.485)


def test_published_weights_are_read_for_a_new_training_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*_: object) -> None:
        raise UserError("read")

    monkeypatch.setattr(PublishedWeights, "load", load)
    names = ("model=torchvision", "model.name=squeezenet1_1", "model.weights=DEFAULT")
    new = job_for(*names, "data.channels=3", "data.resize=32").config
    with pytest.raises(UserError, match="read"):
        make_model(new, Instantiator(), torch.device("cpu"))
    for changes in ({"mode": "test"}, {"resume": "outputs/run"}):
        make_model(replace(new, **changes), Instantiator(), torch.device("cpu"))  # type: ignore[arg-type]
    for name in ZOO_MODELS:
        assert "weights" in signature_parameters(locate(name))
