"""AlexNet, as published for 224 pixels, with a smaller stem and pooling for smaller images."""

from __future__ import annotations

from torch import Tensor, nn

LARGE_IMAGE_SIZE = 128  # pixels; from here on the published stem is used


class AlexNet(nn.Module):
    """Five convolutions and three linear layers.

    Follows A. Krizhevsky, "One weird trick for parallelizing convolutional neural networks",
    arXiv:1404.5997 (2014), the single-column variant of A. Krizhevsky, I. Sutskever and G. E.
    Hinton, "ImageNet classification with deep convolutional neural networks", NIPS 2012. Weights of
    `torchvision.models.alexnet` can be loaded at 224 pixels and width 1.

    The published stem (11 x 11, stride 4) would reduce small images to nothing. Below 128 pixels
    the stem is 5 x 5, with stride 1 up to 40 pixels and stride 2 above; pooling is 2 x 2, and the
    last feature map is averaged to 3 x 3 instead of 6 x 6.

    Args:
        num_classes: Number of output logits.
        in_channels: Channels of the images.
        image_size: Height and width in pixels.
        width: Multiplier of the number of channels and hidden units.
        dropout: Dropout probability before each hidden linear layer.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        image_size: int = 224,
        width: float = 1.0,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if image_size < 24:
            raise ValueError(
                f"image_size={image_size} is too small for AlexNet; allowed: at least 24 pixels"
            )
        c1, c2, c3, c4, c5 = (scale_channels(n, width) for n in (64, 192, 384, 256, 256))
        hidden = scale_channels(4096, width)
        is_large = image_size >= LARGE_IMAGE_SIZE
        side = 6 if is_large else 3
        self.features = nn.Sequential(
            _stem(in_channels, c1, image_size),
            nn.ReLU(inplace=True),
            _pool(is_large),
            nn.Conv2d(c1, c2, kernel_size=5, padding=2),
            nn.ReLU(inplace=True),
            _pool(is_large),
            nn.Conv2d(c2, c3, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(c3, c4, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(c4, c5, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            _pool(is_large),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((side, side))
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(c5 * side * side, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Map images of shape (N, C, H, W) to logits of shape (N, num_classes)."""
        maps: Tensor = self.avgpool(self.features(images))
        logits: Tensor = self.classifier(maps.flatten(1))
        return logits


def _stem(in_channels: int, channels: int, image_size: int) -> nn.Conv2d:
    if image_size >= LARGE_IMAGE_SIZE:
        return nn.Conv2d(in_channels, channels, kernel_size=11, stride=4, padding=2)
    return nn.Conv2d(
        in_channels, channels, kernel_size=5, stride=1 if image_size <= 40 else 2, padding=2
    )


def _pool(is_large: bool) -> nn.MaxPool2d:
    return nn.MaxPool2d(kernel_size=3, stride=2) if is_large else nn.MaxPool2d(kernel_size=2)


def scale_channels(channels: int, width: float) -> int:
    """Multiply the number of channels by the width, and round to a multiple of 8."""
    return max(8, round(channels * width / 8) * 8)
