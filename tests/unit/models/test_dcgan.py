"""DCGAN."""

from __future__ import annotations

import pytest
import torch

from app.models.dcgan import DCGAN


@pytest.mark.parametrize("image_size", [6, 8, 28, 32, 64])
def test_dcgan_generates_images_of_size_that_discriminator_takes(image_size: int) -> None:
    model = DCGAN(3, image_size, latent=5, width=4)
    images = model.generator(torch.randn(2, 5))
    assert images.shape == (2, 3, image_size, image_size)
    assert images.abs().max() <= 1
    logits = model.discriminator(images)
    assert logits.shape == (2,)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_dcgan_refuses_odd_image_size() -> None:
    with pytest.raises(ValueError, match="image_size=27 must be even and above 4"):
        DCGAN(1, 27)
