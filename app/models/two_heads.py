"""A model with two classification heads."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation


class TwoHeads(nn.Module):
    """A convolutional trunk with two linear heads: the digit, and its parity.

    Args:
        in_channels: Channels of the images.
        num_digits: Number of classes of the first head.
        width: Channels of the first block; the second has twice as many.
    """

    def __init__(self, in_channels: int = 1, num_digits: int = 10, width: int = 16) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *Conv2dNormActivation(in_channels, width),
            nn.MaxPool2d(2),
            *Conv2dNormActivation(width, 2 * width),
            nn.MaxPool2d(2),
            nn.AdaptiveAvgPool2d(3),
            nn.Flatten(),
        )
        self.digit = nn.Linear(2 * width * 9, num_digits)
        self.parity = nn.Linear(2 * width * 9, 2)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map images of shape (N, C, H, W) to logits: `digit` (N, num_digits), `parity` (N, 2)."""
        features = self.trunk(images)
        return {"digit": self.digit(features), "parity": self.parity(features)}
