"""DCGAN: a network that makes images, and one that tells them from real ones."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn


class DCGAN(nn.Module):
    """A generator and a discriminator, each the mirror image of the other.

    A. Radford, L. Metz and S. Chintala, "Unsupervised representation learning with deep
    convolutional generative adversarial networks", ICLR 2016: strided convolutions, batch
    normalisation but at the images, ReLU in the generator, LeakyReLU in the discriminator, weights
    drawn with a standard deviation of 0.02.

    Args:
        channels: Of the images.
        image_size: Pixels of a side, even; it is halved as long as it is even and above 4.
        latent: Numbers from which an image is made.
        width: Channels beside the images; with each halving there are twice as many.
    """

    def __init__(
        self, channels: int = 1, image_size: int = 28, latent: int = 64, width: int = 32
    ) -> None:
        super().__init__()
        sides = _halvings(image_size)
        if len(sides) < 2:
            raise ValueError(f"image_size={image_size} must be even and above 4")
        widths = [width * 2**level for level in range(len(sides) - 1)]
        self.generator = Generator(channels, latent, widths, sides[-1])
        self.discriminator = Discriminator(channels, widths, sides[-1])
        self.apply(_draw)


class Generator(nn.Module):
    """From latents to images.

    Args:
        channels: Of the images.
        latent: Numbers from which an image is made.
        widths: Channels, from large maps to small ones.
        side: Of the smallest map.
    """

    def __init__(self, channels: int, latent: int, widths: list[int], side: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Unflatten(1, (latent, 1, 1)),
            nn.ConvTranspose2d(latent, widths[-1], kernel_size=side, bias=False),
            nn.BatchNorm2d(widths[-1]),
            nn.ReLU(inplace=True),
            *(layer for pair in pairwise(widths[::-1]) for layer in _larger(*pair)),
            nn.ConvTranspose2d(widths[0], channels, kernel_size=4, stride=2, padding=1),
            nn.Tanh(),
        )

    def forward(self, latents: Tensor) -> Tensor:
        """Latents of shape (N, latent) to images of shape (N, C, H, W), in [-1, 1]."""
        images: Tensor = self.layers(latents)
        return images


class Discriminator(nn.Module):
    """From images to how real they seem.

    Args:
        channels: Of the images.
        widths: Channels, from large maps to small ones.
        side: Of the smallest map.
    """

    def __init__(self, channels: int, widths: list[int], side: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, widths[0], kernel_size=4, stride=2, padding=1),
            nn.LeakyReLU(0.2, inplace=True),
            *(layer for pair in pairwise(widths) for layer in _smaller(*pair)),
            nn.Conv2d(widths[-1], 1, kernel_size=side),
            nn.Flatten(0),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Images of shape (N, C, H, W), in [-1, 1], to logits of shape (N,)."""
        logits: Tensor = self.layers(images)
        return logits


def _larger(before: int, after: int) -> list[nn.Module]:
    return [
        nn.ConvTranspose2d(before, after, kernel_size=4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(inplace=True),
    ]


def _smaller(before: int, after: int) -> list[nn.Module]:
    return [
        nn.Conv2d(before, after, kernel_size=4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(after),
        nn.LeakyReLU(0.2, inplace=True),
    ]


def _halvings(side: int) -> list[int]:
    """For instance 28, 14, 7."""
    return [side, *(_halvings(side // 2) if side > 4 and side % 2 == 0 else [])]


def _draw(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
