"""DCGAN: a generator of images, and a discriminator between real and generated images."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn


class DCGAN(nn.Module):
    """A generator and a discriminator with mirrored architectures.

    A. Radford, L. Metz and S. Chintala, "Unsupervised representation learning with deep
    convolutional generative adversarial networks", ICLR 2016: strided convolutions, batch
    normalization except next to the images, ReLU in the generator, LeakyReLU in the discriminator,
    and initial weights with a standard deviation of 0.02.

    Args:
        channels: Channels of the images.
        image_size: Height and width in pixels, even; halved while it is even and above 4.
        latent: Dimension of the latent space.
        width: Channels of the largest feature map; they double with each halving.
    """

    def __init__(
        self, channels: int = 1, image_size: int = 28, latent: int = 64, width: int = 32
    ) -> None:
        super().__init__()
        sides = _feature_map_sizes(image_size)
        if len(sides) < 2:
            raise ValueError(f"image_size={image_size} must be even and above 4")
        widths = [width * 2**level for level in range(len(sides) - 1)]
        self.generator = Generator(channels, latent, widths, sides[-1])
        self.discriminator = Discriminator(channels, widths, sides[-1])
        self.apply(_init_weights)


class Generator(nn.Module):
    """Maps latent vectors to images.

    Args:
        channels: Channels of the images.
        latent: Dimension of the latent space.
        widths: Channels of the feature maps, from the largest map to the smallest.
        side: Height and width of the smallest feature map.
    """

    def __init__(self, channels: int, latent: int, widths: list[int], side: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Unflatten(1, (latent, 1, 1)),
            nn.ConvTranspose2d(latent, widths[-1], kernel_size=side, bias=False),
            nn.BatchNorm2d(widths[-1]),
            nn.ReLU(inplace=True),
            *(layer for pair in pairwise(widths[::-1]) for layer in _upsampling_block(*pair)),
            nn.ConvTranspose2d(widths[0], channels, kernel_size=4, stride=2, padding=1),
            nn.Tanh(),
        )

    def forward(self, latents: Tensor) -> Tensor:
        """Map latent vectors of shape (N, latent) to images of shape (N, C, H, W) in [-1, 1]."""
        images: Tensor = self.layers(latents)
        return images


class Discriminator(nn.Module):
    """Classifies images as real or generated.

    Args:
        channels: Channels of the images.
        widths: Channels of the feature maps, from the largest map to the smallest.
        side: Height and width of the smallest feature map.
    """

    def __init__(self, channels: int, widths: list[int], side: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, widths[0], kernel_size=4, stride=2, padding=1),
            nn.LeakyReLU(0.2, inplace=True),
            *(layer for pair in pairwise(widths) for layer in _downsampling_block(*pair)),
            nn.Conv2d(widths[-1], 1, kernel_size=side),
            nn.Flatten(0),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Map images of shape (N, C, H, W) in [-1, 1] to logits of shape (N,)."""
        logits: Tensor = self.layers(images)
        return logits


def _upsampling_block(in_channels: int, out_channels: int) -> list[nn.Module]:
    return [
        nn.ConvTranspose2d(
            in_channels, out_channels, kernel_size=4, stride=2, padding=1, bias=False
        ),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]


def _downsampling_block(in_channels: int, out_channels: int) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, kernel_size=4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.LeakyReLU(0.2, inplace=True),
    ]


def _feature_map_sizes(side: int) -> list[int]:
    """Return the sizes from the image to the smallest map, for instance 28, 14, 7."""
    return [side, *(_feature_map_sizes(side // 2) if side > 4 and side % 2 == 0 else [])]


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
