"""A convolutional autoencoder."""

from __future__ import annotations

from torch import Tensor, nn


class Autoencoder(nn.Module):
    """Encodes images as short vectors, and decodes these back to images.

    Args:
        in_channels: Channels of the images.
        image_size: Height and width in pixels, a multiple of 4.
        latent: Dimension of the latent space.
        width: Channels after the first convolution; the second has twice as many.
    """

    def __init__(
        self, in_channels: int, image_size: int, latent: int = 32, width: int = 16
    ) -> None:
        super().__init__()
        if image_size % 4:
            raise ValueError(f"image_size={image_size} must be a multiple of 4")
        shape = (2 * width, image_size // 4, image_size // 4)
        units = 2 * width * (image_size // 4) ** 2
        self.encoder = nn.Sequential(
            nn.Conv2d(in_channels, width, kernel_size=4, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, 2 * width, kernel_size=4, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(units, latent),
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent, units),
            nn.ReLU(inplace=True),
            nn.Unflatten(1, shape),
            nn.ConvTranspose2d(2 * width, width, kernel_size=4, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(width, in_channels, kernel_size=4, stride=2, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Reconstruct images of shape (N, C, H, W); the result is in [0, 1]."""
        reconstruction: Tensor = self.decoder(self.encoder(images))
        return reconstruction
