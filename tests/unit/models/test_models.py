"""Models: shapes, and AlexNet against torchvision's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from app.models.alexnet import AlexNet
from app.models.autoencoder import Autoencoder
from app.models.cnn import CNN
from app.models.dcgan import DCGAN
from app.models.lenet import LeNet
from app.models.mlp import MLP
from app.models.pretrained import pretrained
from app.models.resnet import ResNet18
from app.models.two_heads import TwoHeads
from app.models.unet import UNet


def test_alexnet_at_224_pixels_is_torchvisions() -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.alexnet(num_classes=7).eval()
    ours = AlexNet(num_classes=7, in_channels=3, image_size=224, width=1.0).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize("image_size", [24, 28, 32, 40, 48, 64, 96, 128, 160, 224])
def test_alexnet_keeps_a_map_for_every_size(image_size: int) -> None:
    model = AlexNet(10, 1, image_size, width=0.125).eval()
    images = torch.rand(2, 1, image_size, image_size)
    assert min(model.features(images).shape[2:]) >= 2
    assert model(images).shape == (2, 10)


def test_alexnet_width_scales_its_weights() -> None:
    def weights(width: float) -> int:
        return sum(p.numel() for p in AlexNet(10, 1, 28, width).parameters())

    assert 12 < weights(1.0) / weights(0.25) < 17


def test_alexnet_refuses_images_that_would_vanish() -> None:
    with pytest.raises(ValueError, match="too small for AlexNet: at least 24 pixels"):
        AlexNet(10, 1, image_size=16)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (LeNet(10), (1, 28, 28)),
        (LeNet(10, 3), (3, 32, 32)),
        (MLP(10, [1, 28, 28], [16, 8], dropout=0.1), (1, 28, 28)),
        (MLP(10, [4], []), (4,)),
        (CNN(10, 3, [8, 8]), (3, 32, 32)),
        (ResNet18(10, 1, width=8), (1, 28, 28)),
    ],
)
def test_every_model_gives_a_logit_for_each_class_and_learns(
    model: nn.Module, shape: tuple[int, ...]
) -> None:
    outputs = model(torch.rand(4, *shape))
    assert outputs.shape == (4, 10)
    outputs.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_resnet18_has_the_published_number_of_weights() -> None:
    # ResNet-18 for CIFAR-10 with the 3 x 3 stem: 11.17 million, as in the usual references.
    assert sum(p.numel() for p in ResNet18(10, 3).parameters()) == 11_173_962


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_unet_gives_logits_for_each_pixel_and_learns(depth: int) -> None:
    model = UNet(2, 5, width=4, depth=depth)
    logits = model(torch.rand(2, 2, 16, 24))
    assert logits.shape == (2, 5, 16, 24)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_unet_has_the_published_number_of_convolutions_and_channels() -> None:
    # Figure 1: 23 convolutional layers, of which 4 are transposed; 1024 channels at the bottom.
    layers = [m for m in UNet(1, 2, width=64, depth=4).modules() if hasattr(m, "out_channels")]
    assert len(layers) == 23
    assert max(layer.out_channels for layer in layers) == 1024  # type: ignore[type-var]


def test_unet_refuses_images_that_cannot_be_halved() -> None:
    with pytest.raises(ValueError, match=r"\[20, 16\] pixels cannot be halved 3 times; .* of 8"):
        UNet(1, 2, width=4)(torch.rand(1, 1, 20, 16))


def test_autoencoder_gives_images_and_learns() -> None:
    model = Autoencoder(3, 32, latent=5, width=4)
    restored = model(torch.rand(2, 3, 32, 32))
    assert restored.shape == (2, 3, 32, 32)
    assert 0 <= restored.min() <= restored.max() <= 1
    assert model.encoder(torch.rand(2, 3, 32, 32)).shape == (2, 5)
    restored.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match="image_size=30 must be a multiple of 4"):
        Autoencoder(1, 30)


def test_two_heads_share_a_trunk() -> None:
    model = TwoHeads(1, width=8)
    outputs = model(torch.rand(4, 1, 28, 28))
    assert {name: tensor.shape for name, tensor in outputs.items()} == {
        "digit": (4, 10),
        "parity": (4, 2),
    }
    outputs["parity"].sum().backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learning == {n for n, _ in model.named_parameters() if not n.startswith("digit")}


@pytest.mark.parametrize("image_size", [6, 8, 28, 32, 64])
def test_dcgan_makes_images_of_the_size_that_it_judges(image_size: int) -> None:
    model = DCGAN(3, image_size, latent=5, width=4)
    images = model.generator(torch.randn(2, 5))
    assert images.shape == (2, 3, image_size, image_size)
    assert images.abs().max() <= 1
    logits = model.discriminator(images)
    assert logits.shape == (2,)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_dcgan_refuses_images_without_a_half() -> None:
    with pytest.raises(ValueError, match="image_size=27 must be even and above 4"):
        DCGAN(1, 27)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("resnet18", "fc"),
        ("alexnet", "classifier.6"),
        ("mobilenet_v3_small", "classifier.3"),
        ("densenet121", "classifier"),
        ("swin_t", "head"),
        ("vit_b_16", "heads.head"),
    ],
)
def test_pretrained_replaces_the_last_linear_layer(name: str, place: str) -> None:
    with torch.device("meta"):  # no weights are drawn
        theirs, ours = torchvision.models.get_model(name), pretrained(name, 7, weights=None)
    head = ours.get_submodule(place)
    assert isinstance(head, nn.Linear)
    assert head.out_features == 7
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_pretrained_gives_logits_and_learns() -> None:
    model = pretrained("resnet18", 7, weights=None)
    outputs = model(torch.rand(2, 3, 32, 32))
    assert outputs.shape == (2, 7)
    outputs.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_pretrained_names_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="name='resnet' is no classification model"):
        pretrained("resnet", 10)
    with pytest.raises(ValueError, match="allowed: IMAGENET1K_V1, DEFAULT, or null"):
        pretrained("resnet18", 10, weights="V3")
    with pytest.raises(ValueError, match=r"squeezenet1_0.* has no linear layer"):
        pretrained("squeezenet1_0", 10, weights=None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    file.parent.mkdir(parents=True)
    for content in (b"", b"text"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"f37072fd\.pth is damaged or another: its SHA"):
            pretrained("resnet18", 10)
    torch.save({"fc.weight": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"f37072fd\.pth is damaged or another: its SHA"):
        pretrained("resnet18", 10)
