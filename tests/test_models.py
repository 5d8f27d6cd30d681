"""Models: shapes, and AlexNet against torchvision's."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from app.models.alexnet import AlexNet
from app.models.cnn import CNN
from app.models.lenet import LeNet
from app.models.mlp import MLP
from app.models.resnet import ResNet18


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
