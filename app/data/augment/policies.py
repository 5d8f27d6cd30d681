"""Policies that draw operations and their magnitude for each image: TrivialAugment, RandAugment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from app.data.augment.base import (
    Augmentation,
    Params,
    check_integer,
    check_probability,
    per_pixel,
    transform_where,
)
from app.data.augment.color import (
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    adjust_sharpness,
)
from app.data.augment.geometry import check_interpolation, inverse_affine_matrix, warp

# torchvision's operations, in its order. Those in GEOMETRIC and FACTORS also draw a sign.
OPERATIONS = (
    *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"),
    *("Brightness", "Color", "Contrast", "Sharpness"),
    *("Posterize", "Solarize", "AutoContrast", "Equalize"),
)
GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
FACTORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Brightness": adjust_brightness,
    "Color": adjust_saturation,
    "Contrast": adjust_contrast,
    "Sharpness": adjust_sharpness,
}


class TrivialAugmentWide(Augmentation):
    """Apply one random operation of random magnitude to each image (Müller and Hutter 2021).

    Args:
        num_magnitude_bins: Number of magnitudes.
        interpolation: `nearest` or `bilinear`, for geometric operations.
        fill: Value in [0, 1] outside of the image, also for uint8.
    """

    def __init__(
        self, num_magnitude_bins: int = 31, interpolation: str = "nearest", fill: float = 0.0
    ) -> None:
        super().__init__()
        self.num_magnitude_bins = check_integer("num_magnitude_bins", num_magnitude_bins, 2)
        self.interpolation = check_interpolation(interpolation)
        self.fill = check_probability("fill", fill)

    def make_params(self, images: Tensor) -> Params:
        shape, bins = (len(images), 1), self.num_magnitude_bins
        table = magnitudes((0.99, 0.99, 32, 32, 135), 0.99, 6, bins, images.device)
        return draw_operations(table, torch.randint(bins, shape, device=images.device))

    def transform(self, images: Tensor, params: Params) -> Tensor:
        return apply_operations(images, **params, interpolation=self.interpolation, fill=self.fill)


class RandAugment(Augmentation):
    """Apply `num_ops` random operations of the same magnitude to each image (Cubuk et al. 2020).

    Args:
        num_ops: Number of operations.
        magnitude: Magnitude of all operations, from 0 to `num_magnitude_bins - 1`.
        num_magnitude_bins: Number of magnitudes.
        interpolation: `nearest` or `bilinear`, for geometric operations.
        fill: Value in [0, 1] outside of the image, also for uint8.
    """

    def __init__(
        self,
        num_ops: int = 2,
        magnitude: int = 9,
        num_magnitude_bins: int = 31,
        interpolation: str = "nearest",
        fill: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_ops = check_integer("num_ops", num_ops, 0)
        self.num_magnitude_bins = check_integer("num_magnitude_bins", num_magnitude_bins, 2)
        self.magnitude = check_integer("magnitude", magnitude, 0, num_magnitude_bins - 1)
        self.interpolation = check_interpolation(interpolation)
        self.fill = check_probability("fill", fill)

    def make_params(self, images: Tensor) -> Params:
        height, width = images.shape[-2:]
        maxima = (0.3, 0.3, 150 / 331 * width, 150 / 331 * height, 30)
        table = magnitudes(maxima, 0.9, 4, self.num_magnitude_bins, images.device)
        shape = (len(images), self.num_ops)
        return draw_operations(table, torch.full(shape, self.magnitude, device=images.device))

    def transform(self, images: Tensor, params: Params) -> Tensor:
        return apply_operations(images, **params, interpolation=self.interpolation, fill=self.fill)


def magnitudes(
    geometric: Sequence[float], factor: float, bits: int, bins: int, device: torch.device
) -> Tensor:
    """Return the magnitude of each operation in each bin, of shape (operations, bins).

    Args:
        geometric: Largest magnitude of each geometric operation: shear, pixels, degrees.
        factor: Largest distance from 1 of the factors of the other signed operations.
        bits: How many of the 8 bits `Posterize` removes at most.
        bins: Number of magnitudes.
        device: Device of the result.
    """
    signed = [0.0, *geometric, *[factor] * len(FACTORS)]
    rows = [torch.linspace(0, maximum, bins, device=device) for maximum in signed]
    posterize = 8 - torch.linspace(0, bits, bins, device=device).round()
    solarize = torch.linspace(1, 0, bins, device=device)
    return torch.stack([*rows, posterize, solarize, *[torch.zeros_like(solarize)] * 2])


def draw_operations(magnitudes: Tensor, bins: Tensor) -> Params:
    """Draw operations, and signs of their magnitudes.

    Args:
        magnitudes: Magnitude of each operation in each bin.
        bins: Bin of each operation that is applied to each image, of shape (N, K).

    Returns:
        `operation`, an index into `OPERATIONS`, and `magnitude`, each of shape (N, K).
    """
    operation = torch.randint(len(OPERATIONS), bins.shape, device=bins.device)
    is_signed = operation <= OPERATIONS.index("Sharpness")
    is_negative = is_signed & (torch.rand(bins.shape, device=bins.device) < 0.5)
    magnitude = magnitudes[operation, bins]
    return {"operation": operation, "magnitude": torch.where(is_negative, -magnitude, magnitude)}


def apply_operations(
    images: Tensor, operation: Tensor, magnitude: Tensor, interpolation: str, fill: float
) -> Tensor:
    """Apply to each image its operations, one after the other.

    Args:
        images: Floats in [0, 1] of shape (N, C, H, W).
        operation: Indices into `OPERATIONS`, of shape (N, K).
        magnitude: As torchvision defines it for each operation, of shape (N, K).
        interpolation: `nearest` or `bilinear`, for geometric operations.
        fill: Value outside of the image.
    """
    move = partial(_move, interpolation=interpolation, fill=fill)
    for index, strength in zip(operation.unbind(1), magnitude.unbind(1), strict=True):
        is_op = {name: index == number for number, name in enumerate(OPERATIONS)}
        is_geometric = (index >= 1) & (index <= len(GEOMETRIC))
        images = transform_where(is_geometric, move, images, index, strength)
        for name, function in FACTORS.items():
            images = transform_where(is_op[name], function, images, 1 + strength)
        images = transform_where(is_op["Posterize"], posterize, images, strength)
        images = transform_where(is_op["Solarize"], solarize, images, strength)
        images = transform_where(is_op["AutoContrast"], autocontrast, images)
        images = transform_where(is_op["Equalize"], tv.equalize, images)
    return images


def _move(
    images: Tensor, operation: Tensor, magnitude: Tensor, interpolation: str, fill: float
) -> Tensor:
    """Apply to each image its geometric operation."""
    is_op = {name: operation == number for number, name in enumerate(OPERATIONS)}
    none = torch.zeros_like(magnitude)
    height, width = images.shape[-2:]
    shear = torch.rad2deg(magnitude.atan())
    is_shear = is_op["ShearX"] | is_op["ShearY"]
    pixels = magnitude.trunc()
    matrix = inverse_affine_matrix(
        angle=torch.where(is_op["Rotate"], -magnitude, none),
        translate=torch.stack(
            [torch.where(is_op[name], pixels, none) for name in ("TranslateX", "TranslateY")], 1
        ),
        scale=torch.ones_like(magnitude),
        shear=torch.stack(
            [torch.where(is_op[name], shear, none) for name in ("ShearX", "ShearY")], 1
        ),
        center=torch.stack([is_shear * (-width / 2), is_shear * (-height / 2)], 1),  # upper left
    )
    return warp(images, matrix, interpolation, fill)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep only the highest bits of 8 in each image."""
    step = per_pixel(2 ** (8 - bits))
    return (images * 255).round_().div_(step).floor_().mul_(step).div_(255)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert pixels that are not below the threshold of their image, in steps of 1 / 255."""
    is_bright = (images * 255).round_() >= per_pixel(255 * threshold)
    return torch.where(is_bright, 1 - images, images)


def autocontrast(images: Tensor) -> Tensor:
    """Stretch each channel of each image to [0, 1]; channels of a single value stay.

    That of torchvision waits for the device.
    """
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    stretched = (images - low) / (high - low)
    return torch.where(high > low, stretched, images)
