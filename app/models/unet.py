"""U-Net, for semantic segmentation."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation


class UNet(nn.Module):
    """Encoder and decoder at halving resolutions, with skip connections between them.

    O. Ronneberger, P. Fischer and T. Brox, "U-Net: convolutional networks for biomedical image
    segmentation", MICCAI 2015; with padded convolutions, so that outputs are as large as inputs,
    and with batch normalization. The published network has width 64 and depth 4.

    Args:
        in_channels: Channels of the images.
        num_classes: Number of output channels.
        width: Channels at full resolution; they double with each halving.
        depth: Number of halvings of the resolution.
    """

    def __init__(self, in_channels: int, num_classes: int, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(depth + 1)]
        upwards = [(above, below) for above, below in pairwise(widths)][::-1]
        self.depth = depth
        self.stem = _block(in_channels, width)
        self.down = nn.ModuleList(_block(above, below) for above, below in pairwise(widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(below, above, 2, 2) for above, below in upwards)
        self.merge = nn.ModuleList(_block(2 * above, above) for above, _ in upwards)
        self.classifier = nn.Conv2d(width, num_classes, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        """Map images of shape (N, C, H, W) to logits of shape (N, num_classes, H, W).

        Raises:
            ValueError: H or W is not a multiple of `2 ** depth`.
        """
        if any(side % 2**self.depth for side in images.shape[2:]):
            raise ValueError(
                f"images of {list(images.shape[2:])} pixels cannot be halved {self.depth} times; "
                f"allowed: multiples of {2**self.depth}"
            )
        maps: Tensor = self.stem(images)
        skips = []
        for block in self.down:
            skips.append(maps)
            maps = block(F.max_pool2d(maps, 2))
        for up, merge in zip(self.up, self.merge, strict=True):
            maps = merge(torch.cat([skips.pop(), up(maps)], dim=1))
        logits: Tensor = self.classifier(maps)
        return logits


def _block(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        *Conv2dNormActivation(in_channels, out_channels),
        *Conv2dNormActivation(out_channels, out_channels),
    )
