"""How little images resemble those that were wanted."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure


class SSIMLoss(nn.Module):
    """1 - SSIM, the mean over images: 0 for equal ones, 2 at most.

    Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity",
    with its Gaussian window of 11 x 11 pixels.

    Args:
        data_range: The largest possible difference of two values; 1 for images in [0, 1].

    Raises:
        ValueError: The range is not above 0.
    """

    def __init__(self, data_range: float = 1.0) -> None:
        super().__init__()
        if not 0 < data_range < math.inf:
            raise ValueError(f"data_range={data_range} must be above 0 and finite")
        self.data_range = data_range

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss, a scalar, computed in float32 at least; both of shape (N, C, H, W)."""
        dtype = torch.promote_types(output.dtype, torch.float32)
        # Variances are differences of squares here: half precision would leave nothing of them.
        with torch.autocast(output.device.type, enabled=False):
            similarity = structural_similarity_index_measure(
                output.to(dtype), target.to(dtype), data_range=self.data_range
            )
        assert isinstance(similarity, Tensor)
        return 1 - similarity
