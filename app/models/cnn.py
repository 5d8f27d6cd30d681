"""A small convolutional network with batch normalization."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation


class CNN(nn.Module):
    """Blocks of convolution, batch normalization, ReLU and pooling, then global average pooling.

    Args:
        num_classes: Number of output logits.
        in_channels: Channels of the images.
        channels: Channels of each block; each block halves the resolution.
    """

    def __init__(
        self, num_classes: int, in_channels: int = 1, channels: Sequence[int] = (32, 64, 128)
    ) -> None:
        super().__init__()
        blocks = [_block(before, after) for before, after in pairwise([in_channels, *channels])]
        self.features = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(channels[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images of shape (N, C, H, W) to logits of shape (N, num_classes)."""
        logits: Tensor = self.classifier(self.features(images))
        return logits


def _block(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(*Conv2dNormActivation(in_channels, out_channels), nn.MaxPool2d(2))
