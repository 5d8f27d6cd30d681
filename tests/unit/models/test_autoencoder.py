"""The autoencoder."""

from __future__ import annotations

import pytest
import torch

from app.models.autoencoder import Autoencoder


def test_autoencoder_reconstructs_images_and_all_parameters_get_gradients() -> None:
    model = Autoencoder(3, 32, latent=5, width=4)
    reconstruction = model(torch.rand(2, 3, 32, 32))
    assert reconstruction.shape == (2, 3, 32, 32)
    assert 0 <= reconstruction.min() <= reconstruction.max() <= 1
    assert model.encoder(torch.rand(2, 3, 32, 32)).shape == (2, 5)
    reconstruction.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match="image_size=30 must be a multiple of 4"):
        Autoencoder(1, 30)
