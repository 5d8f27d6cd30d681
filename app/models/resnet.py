"""ResNet-18 for small images."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from torchvision.ops import Conv2dNormActivation


class ResNet18(nn.Module):
    """ResNet-18 with a 3 x 3 stem without pooling, as used for CIFAR.

    K. He, X. Zhang, S. Ren and J. Sun, "Deep residual learning for image recognition", CVPR 2016;
    the stem for small images is that of its section 4.2. For 224 pixels use
    `torchvision.models.resnet18`.

    Args:
        num_classes: Number of output logits.
        in_channels: Channels of the images.
        width: Channels of the first of four stages; they double with each stage.
    """

    def __init__(self, num_classes: int, in_channels: int = 3, width: int = 64) -> None:
        super().__init__()
        self.stem = Conv2dNormActivation(in_channels, width)
        self.levels = nn.Sequential(
            _stage(width, width, stride=1),
            _stage(width, 2 * width, stride=2),
            _stage(2 * width, 4 * width, stride=2),
            _stage(4 * width, 8 * width, stride=2),
        )
        self.classifier = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, num_classes)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Map images of shape (N, C, H, W) to logits of shape (N, num_classes)."""
        logits: Tensor = self.classifier(self.levels(self.stem(images)))
        return logits


def _stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    shortcut = None
    if stride != 1 or in_channels != out_channels:
        shortcut = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False),
            nn.BatchNorm2d(out_channels),
        )
    return nn.Sequential(
        BasicBlock(in_channels, out_channels, stride, shortcut),
        BasicBlock(out_channels, out_channels),
    )
