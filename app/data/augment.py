"""Augmentations of batches in which every image gets its own random parameters.

Transforms of torchvision v2 can be used beside them; given a batch, those draw their parameters
once for all images in it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RandomShift(nn.Module):
    """Shift each image by a random offset and fill with zeros.

    Equivalent to a random crop of the original size after zero padding.

    Args:
        pixels: Maximum offset along each axis, in both directions.
    """

    def __init__(self, pixels: int) -> None:
        super().__init__()
        if pixels < 1:
            raise ValueError(f"pixels={pixels} must be at least 1")
        self.pixels = pixels

    def forward(self, images: Tensor) -> Tensor:
        """Shift images of shape (N, C, H, W)."""
        count, _, height, width = images.shape
        padded = F.pad(images, [self.pixels] * 4)
        shifts = torch.randint(0, 2 * self.pixels + 1, (2, count, 1), device=images.device)
        rows = (shifts[0] + torch.arange(height, device=images.device))[:, :, None]
        columns = (shifts[1] + torch.arange(width, device=images.device))[:, None, :]
        sample = torch.arange(count, device=images.device)[:, None, None]
        return padded.permute(0, 2, 3, 1)[sample, rows, columns].permute(0, 3, 1, 2).contiguous()


class RandomFlip(nn.Module):
    """Flip each image horizontally with the given probability.

    Args:
        probability: Between 0 and 1.
    """

    def __init__(self, probability: float = 0.5) -> None:
        super().__init__()
        if not 0 <= probability <= 1:
            raise ValueError(f"probability={probability} must be between 0 and 1")
        self.probability = probability

    def forward(self, images: Tensor) -> Tensor:
        """Flip images of shape (N, C, H, W)."""
        flip = torch.rand(len(images), 1, 1, 1, device=images.device) < self.probability
        return torch.where(flip, images.flip(-1), images)
