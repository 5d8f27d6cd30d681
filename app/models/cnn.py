"""A convolutional network with batch normalization."""

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
        depth: Convolutions of each block.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 1,
        channels: Sequence[int] = (32, 64, 128),
        depth: int = 1,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth={depth}: each block needs at least 1 convolution")
        widths = [in_channels, *channels]
        blocks = [_block(before, after, depth) for before, after in pairwise(widths)]
        self.features = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(channels[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images of shape (N, C, H, W) to logits of shape (N, num_classes)."""
        logits: Tensor = self.classifier(self.features(images))
        return logits


def _block(in_channels: int, out_channels: int, depth: int) -> nn.Sequential:
    widths = [in_channels, *[out_channels] * depth]
    layers = [layer for pair in pairwise(widths) for layer in Conv2dNormActivation(*pair)]
    return nn.Sequential(*layers, nn.MaxPool2d(2))
