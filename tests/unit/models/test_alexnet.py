"""AlexNet, compared with torchvision."""

from __future__ import annotations

import pytest
import torch
import torchvision

from app.models.alexnet import AlexNet


def test_alexnet_at_224_pixels_matches_torchvision() -> None:
    torch.manual_seed(0)
    reference = torchvision.models.alexnet(num_classes=7).eval()
    model = AlexNet(num_classes=7, in_channels=3, image_size=224, width=1.0).eval()
    model.load_state_dict(reference.state_dict())
    images = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(model(images), reference(images))


@pytest.mark.parametrize("image_size", [24, 28, 32, 40, 48, 64, 96, 128, 160, 224])
def test_alexnet_keeps_feature_map_at_every_image_size(image_size: int) -> None:
    model = AlexNet(10, 1, image_size, width=0.125).eval()
    images = torch.rand(2, 1, image_size, image_size)
    assert min(model.features(images).shape[2:]) >= 2
    assert model(images).shape == (2, 10)


def test_alexnet_width_scales_number_of_parameters() -> None:
    def num_parameters(width: float) -> int:
        return sum(p.numel() for p in AlexNet(10, 1, 28, width).parameters())

    assert 12 < num_parameters(1.0) / num_parameters(0.25) < 17


def test_alexnet_refuses_too_small_images() -> None:
    with pytest.raises(ValueError, match="too small for AlexNet; allowed: at least 24 pixels"):
        AlexNet(10, 1, image_size=16)
