"""Structural similarity of images as a loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure


class SSIMLoss(nn.Module):
    """`1 - SSIM`, averaged over images: 0 for identical images, 2 at most.

    Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004,
    with a Gaussian window of 11 x 11 pixels.

    Args:
        data_range: Difference of the largest and the smallest possible value, above 0; 1 for images
            in [0, 1].
    """

    def __init__(self, data_range: float = 1.0) -> None:
        super().__init__()
        if not 0 < data_range < math.inf:
            raise ValueError(f"data_range={data_range} must be above 0 and finite")
        self.data_range = data_range

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the scalar loss of images (N, C, H, W), computed in float32 or wider."""
        dtype = torch.promote_types(output.dtype, torch.float32)
        # Variances are differences of squares, which cancel out in half precision.
        with torch.autocast(output.device.type, enabled=False):
            similarity = structural_similarity_index_measure(
                output.to(dtype), target.to(dtype), data_range=self.data_range
            )
        assert isinstance(similarity, Tensor)
        return 1 - similarity
