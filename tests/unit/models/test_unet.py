"""U-Net."""

from __future__ import annotations

import pytest
import torch

from app.models.unet import UNet


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_unet_gives_logits_per_pixel_and_all_parameters_get_gradients(depth: int) -> None:
    model = UNet(2, 5, width=4, depth=depth)
    logits = model(torch.rand(2, 2, 16, 24))
    assert logits.shape == (2, 5, 16, 24)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_unet_has_published_number_of_convolutions_and_channels() -> None:
    # Figure 1: 23 convolutional layers, of which 4 are transposed; 1024 channels at the bottom.
    layers = [m for m in UNet(1, 2, width=64, depth=4).modules() if hasattr(m, "out_channels")]
    assert len(layers) == 23
    assert max(layer.out_channels for layer in layers) == 1024  # type: ignore[type-var]


def test_unet_refuses_image_sizes_that_cannot_be_halved() -> None:
    with pytest.raises(ValueError, match=r"\[20, 16\] pixels cannot be halved 3 times; .* of 8"):
        UNet(1, 2, width=4)(torch.rand(1, 1, 20, 16))
