"""A convolutional autoencoder."""

from __future__ import annotations

from torch import Tensor, nn


class Autoencoder(nn.Module):
    """From images to a short code, and from the code back to images.

    Args:
        in_channels: Of the images.
        image_size: Pixels of a side, a multiple of 4.
        latent: Numbers in the code.
        width: Channels after the first convolution; there are twice as many after the second.
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
        """Images of shape (N, C, H, W) to images of that shape, in [0, 1]."""
        restored: Tensor = self.decoder(self.encoder(images))
        return restored
