"""Augmentations of colors and sharpness."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from app.data.augment.base import (
    Augmentation,
    Params,
    bernoulli,
    check_interval,
    check_probability,
    check_size,
    check_spread,
    per_pixel,
    uniform,
)
from app.runtime.errors import UserError


class ColorJitter(Augmentation):
    """Change brightness, contrast, saturation and hue of each image, in this order.

    torchvision draws the order, too. Gray images keep their saturation and hue.

    Args:
        brightness: Range of the factor; a number stands for [1 - number, 1 + number].
        contrast: In the same form.
        saturation: In the same form.
        hue: Range of the shift, as a fraction of the color circle between -0.5 and 0.5; a number
            stands for both directions.
        p: Probability that an image is changed.
    """

    keeps_masks = True

    def __init__(
        self,
        brightness: float | Sequence[float] = 0.0,
        contrast: float | Sequence[float] = 0.0,
        saturation: float | Sequence[float] = 0.0,
        hue: float | Sequence[float] = 0.0,
        p: float = 1.0,
    ) -> None:
        super().__init__()
        self.brightness = check_spread("brightness", brightness, 1, 0, 100)
        self.contrast = check_spread("contrast", contrast, 1, 0, 100)
        self.saturation = check_spread("saturation", saturation, 1, 0, 100)
        self.hue = check_spread("hue", hue, 0, -0.5, 0.5)
        self.p = check_probability("p", p)

    def make_params(self, images: Tensor) -> Params:
        params = {
            "brightness_factor": uniform(images, self.brightness),
            "contrast_factor": uniform(images, self.contrast),
            "saturation_factor": uniform(images, self.saturation),
            "hue_factor": uniform(images, self.hue),
        }
        return {"mask": bernoulli(images, self.p), **params}

    def transform(self, images: Tensor, params: Params) -> Tensor:
        steps = (
            (adjust_brightness, "brightness_factor", self.brightness != (1, 1)),
            (adjust_contrast, "contrast_factor", self.contrast != (1, 1)),
            (adjust_saturation, "saturation_factor", self.saturation != (1, 1)),
            (adjust_hue, "hue_factor", self.hue != (0, 0)),
        )
        for function, name, has_effect in steps:
            if has_effect:
                images = function(images, params[name])
        return images


class RandomGrayscale(Augmentation):
    """Remove the color of each image with a probability; the number of channels stays.

    Args:
        p: The probability.
    """

    keeps_masks = True

    def __init__(self, p: float = 0.1) -> None:
        super().__init__()
        self.p = check_probability("p", p)

    def make_params(self, images: Tensor) -> Params:
        return {"mask": bernoulli(images, self.p)}

    def transform(self, images: Tensor, params: Params) -> Tensor:  # noqa: ARG002
        return grayscale(images).expand_as(images)


class GaussianBlur(Augmentation):
    """Blur each image.

    Args:
        kernel_size: Height and width of the kernel, odd; a single number stands for both.
        sigma: Range of the standard deviation in pixels.
        p: Probability that an image is blurred.
    """

    keeps_masks = True

    def __init__(
        self,
        kernel_size: int | Sequence[int],
        sigma: Sequence[float] = (0.1, 2.0),
        p: float = 1.0,
    ) -> None:
        super().__init__()
        self.kernel_size = check_size("kernel_size", kernel_size)
        if not all(size % 2 for size in self.kernel_size):
            raise ValueError(f"kernel_size={kernel_size!r} is not valid; allowed: odd integers")
        self.sigma = check_interval("sigma", sigma, 1e-3, 1e3)
        self.p = check_probability("p", p)

    def make_params(self, images: Tensor) -> Params:
        return {"mask": bernoulli(images, self.p), "sigma": uniform(images, self.sigma)}

    def transform(self, images: Tensor, params: Params) -> Tensor:
        for dim, kernel_size in zip((2, 3), self.kernel_size, strict=True):
            images = _blur(images, params["sigma"], kernel_size, dim)
        return images


def _blur(images: Tensor, sigma: Tensor, kernel_size: int, dim: int) -> Tensor:
    """Blur along a dimension; pixels outside of the image are its mirror image."""
    size, radius = images.shape[dim], kernel_size // 2
    offset = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.exp(-0.5 * (offset / sigma[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    period = max(2 * (size - 1), 1)
    index = torch.arange(-radius, size + radius, device=images.device) % period
    padded = images.index_select(dim, torch.minimum(index, period - index).clamp(max=size - 1))
    blurred = torch.zeros_like(images)
    for tap, weight in enumerate(kernel.unbind(1)):
        blurred.addcmul_(padded.narrow(dim, tap, size), per_pixel(weight))
    return blurred


def blend(images: Tensor, other: Tensor | float, factor: Tensor) -> Tensor:
    """Return `factor * images + (1 - factor) * other` in [0, 1]; the factors have shape (N,)."""
    factor = per_pixel(factor)
    return (factor * images + (1 - factor) * other).clamp_(0, 1)


def grayscale(images: Tensor) -> Tensor:
    """Return images of one channel, with the weights of ITU-R BT.601.

    Raises:
        UserError: The number of channels is not 1 or 3.
    """
    if images.shape[1] == 1:
        return images
    if images.shape[1] != 3:
        raise UserError(f"images with {images.shape[1]} channels have no color; allowed: 1 or 3")
    return 0.2989 * images[:, :1] + 0.587 * images[:, 1:2] + 0.114 * images[:, 2:]


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply each image by its factor."""
    return blend(images, 0.0, factor)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend each image with the mean of its gray values."""
    return blend(images, grayscale(images).mean((1, 2, 3), keepdim=True), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend each image with its gray values."""
    return blend(images, grayscale(images), factor)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Move the hue of each image by a fraction of the color circle, in HSV.

    Hue leaves the largest and the smallest channel of a pixel as they are, and each channel is a
    piecewise linear function of it.
    """
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    low, high = images.aminmax(dim=1)
    chroma = high - low
    divisor = torch.where(chroma > 0, chroma, 1)
    hue = torch.where(
        high == red,
        (green - blue) / divisor,
        torch.where(high == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    hue = hue + 6 * shift[:, None, None]
    sectors = [torch.remainder(hue + channel, 6) for channel in (5, 3, 1)]
    return torch.stack([high - chroma * torch.minimum(k, 4 - k).clamp(0, 1) for k in sectors], 1)


def adjust_sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend each image with a smoothed one, except at its edges."""
    if images.shape[-2] <= 2 or images.shape[-1] <= 2:
        return images
    inner = images[..., 1:-1, 1:-1]
    smooth = images.clone()
    smooth[..., 1:-1, 1:-1] = (9 * F.avg_pool2d(images, 3, stride=1) + 4 * inner) / 13
    return blend(images, smooth, factor)
