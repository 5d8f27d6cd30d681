"""Augmentations of whole batches in which every image draws its own parameters.

A transform of torchvision v2 can stand beside them; given a batch, it draws once for all of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RandomShift(nn.Module):
    """Moves each image by up to so many pixels, black coming in: the random crop after padding.

    Args:
        pixels: At most so many, in both directions.
    """

    def __init__(self, pixels: int) -> None:
        super().__init__()
        if pixels < 1:
            raise ValueError(f"pixels={pixels} must be at least 1")
        self.pixels = pixels

    def forward(self, images: Tensor) -> Tensor:
        """Images of shape (N, C, H, W) to the same shape."""
        count, _, height, width = images.shape
        padded = F.pad(images, [self.pixels] * 4)
        shifts = torch.randint(0, 2 * self.pixels + 1, (2, count, 1), device=images.device)
        rows = (shifts[0] + torch.arange(height, device=images.device))[:, :, None]
        columns = (shifts[1] + torch.arange(width, device=images.device))[:, None, :]
        sample = torch.arange(count, device=images.device)[:, None, None]
        return padded.permute(0, 2, 3, 1)[sample, rows, columns].permute(0, 3, 1, 2).contiguous()


class RandomFlip(nn.Module):
    """Mirrors each image, left to right, with the given probability.

    Args:
        probability: Between 0 and 1.
    """

    def __init__(self, probability: float = 0.5) -> None:
        super().__init__()
        if not 0 <= probability <= 1:
            raise ValueError(f"probability={probability} must be between 0 and 1")
        self.probability = probability

    def forward(self, images: Tensor) -> Tensor:
        """Images of shape (N, C, H, W) to the same shape."""
        flip = torch.rand(len(images), 1, 1, 1, device=images.device) < self.probability
        return torch.where(flip, images.flip(-1), images)
