"""ResNet-18 for small images."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock


class ResNet18(nn.Module):
    """Residual blocks 2, 2, 2, 2 behind a 3 x 3 stem without pooling, as for CIFAR.

    K. He, X. Zhang, S. Ren and J. Sun, "Deep residual learning for image recognition", CVPR 2016;
    the stem for small images is that of its section 4.2. For 224 pixels take
    `torchvision.models.resnet18`.

    Args:
        num_classes: Length of the output.
        in_channels: Of the images.
        width: Channels of the first of four levels; each next one has twice as many.
    """

    def __init__(self, num_classes: int, in_channels: int = 3, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        self.levels = nn.Sequential(
            _level(width, width, stride=1),
            _level(width, 2 * width, stride=2),
            _level(2 * width, 4 * width, stride=2),
            _level(4 * width, 8 * width, stride=2),
        )
        self.classifier = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, num_classes)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Images of shape (N, C, H, W) to logits of shape (N, num_classes)."""
        logits: Tensor = self.classifier(self.levels(self.stem(images)))
        return logits


def _level(before: int, after: int, stride: int) -> nn.Sequential:
    shortcut = None
    if stride != 1 or before != after:
        shortcut = nn.Sequential(
            nn.Conv2d(before, after, kernel_size=1, stride=stride, bias=False),
            nn.BatchNorm2d(after),
        )
    return nn.Sequential(BasicBlock(before, after, stride, shortcut), BasicBlock(after, after))
