"""A small FCOS, for images and objects of a few dozen pixels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import Conv2dNormActivation

from app.models.detector import Detector


class FCOS(Detector):
    """Tian et al. 2019, "FCOS: fully convolutional one-stage object detection", on one feature map.

    The backbone has blocks of two convolutions, each of which halves the resolution; the head is
    torchvision's.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images.
        channels: Channels of each block; the last number must be a multiple of 32, the number of
            groups that the head normalizes.
    """

    def __init__(
        self, num_classes: int, in_channels: int = 3, channels: Sequence[int] = (32, 64, 64)
    ) -> None:
        if not channels or channels[-1] % 32:
            raise ValueError(f"channels={[*channels]}: the last must be a multiple of 32")
        widths = [in_channels, *channels]
        layers = [layer for pair in pairwise(widths) for layer in _block(*pair)]
        backbone: Any = nn.Sequential(*layers)
        backbone.out_channels = channels[-1]
        stride = 2 ** len(channels)
        anchors = AnchorGenerator(sizes=((stride,),), aspect_ratios=((1.0,),))
        super().__init__(detection.FCOS(backbone, num_classes, anchor_generator=anchors), 0)


def _block(in_channels: int, out_channels: int) -> list[nn.Module]:
    return [
        Conv2dNormActivation(in_channels, out_channels, stride=2),
        Conv2dNormActivation(out_channels, out_channels),
    ]
