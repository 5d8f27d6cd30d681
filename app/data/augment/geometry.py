"""Augmentations that move or hide pixels: crops, shifts, flips, affine maps, erasing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from app.data.augment.base import (
    Augmentation,
    Params,
    bernoulli,
    check_integer,
    check_interval,
    check_probability,
    check_size,
    check_spread,
    from_unit,
    per_pixel,
    to_unit,
    uniform,
)
from app.data.rows import chunk_size, for_chunks

ATTEMPTS = 10  # to draw a box that fits into the image, as in torchvision
BOX = ("top", "left", "height", "width")
INTERPOLATIONS = ("nearest", "bilinear")


class RandomResizedCrop(Augmentation):
    """Crop each image to a random part, and resize that to `size` (bilinear).

    On the CPU, the kernel that torchvision uses resizes each crop by itself, since it is faster
    than any batched method there, and twice as fast for images in channels_last memory format. On
    other devices all crops are resized by two batched matrix products, which have the same
    antialiasing weights.

    Args:
        size: Height and width of the result; a single number stands for both.
        scale: Range of the area of the crop, relative to the image.
        ratio: Range of the width of the crop divided by its height.
        antialias: Whether to average over all pixels of the crop when it shrinks.
    """

    in_float = False
    in_chunks = False

    def __init__(
        self,
        size: int | Sequence[int],
        scale: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        antialias: bool = True,
    ) -> None:
        super().__init__()
        self.size = check_size("size", size)
        self.scale = check_interval("scale", scale, 0, 1)
        self.ratio = check_interval("ratio", ratio, 1e-3, 1e3)
        self.antialias = antialias

    @property
    def needed_side(self) -> int | None:
        """Length of the shorter side of images with which no crop is enlarged; None if unknown."""
        smallest = self.scale[0] * min(self.ratio[0], 1 / self.ratio[1])
        return math.ceil(max(self.size) / math.sqrt(smallest)) if smallest else None

    def make_params(self, images: Tensor) -> Params:
        if not images.is_cpu:
            return self.draw_boxes(images)
        # Single images are common, and tensors of one number are twenty times as slow as numbers
        numbers = torch.rand(2 * ATTEMPTS + 2, len(images)).T.tolist()  # as `draw_boxes` does
        height, width = images.shape[-2:]
        boxes = [self._choose_box(height, width, row) for row in numbers]
        columns = torch.tensor(boxes, dtype=torch.int64).reshape(-1, len(BOX)).unbind(1)
        return dict(zip(BOX, columns, strict=True))

    def _choose_box(
        self, full_height: int, full_width: int, numbers: list[float]
    ) -> tuple[int, int, int, int]:
        """Return (top, left, height, width) for numbers that are uniform in [0, 1)."""
        low, high = map(math.log, self.ratio)
        *shapes, row, column = numbers
        for first, second in zip(shapes[:ATTEMPTS], shapes[ATTEMPTS:], strict=True):
            share = self.scale[0] + (self.scale[1] - self.scale[0]) * first
            ratio = math.exp(low + (high - low) * second)
            height = round(math.sqrt(full_height * full_width * share / ratio))
            width = round(math.sqrt(full_height * full_width * share * ratio))
            if 0 < height <= full_height and 0 < width <= full_width:
                top = math.floor(row * (full_height - height + 1))
                return top, math.floor(column * (full_width - width + 1)), height, width
        height, width = self._center_size(full_height, full_width)
        return (full_height - height) // 2, (full_width - width) // 2, height, width

    def draw_boxes(self, images: Tensor) -> Params:
        """Draw all boxes at once, without reading anything from the device."""
        full_height, full_width = images.shape[-2:]
        heights, widths = _draw_sizes(images, self.scale, self.ratio)
        fits = (heights > 0) & (heights <= full_height) & (widths > 0) & (widths <= full_width)
        center_height, center_width = self._center_size(full_height, full_width)
        height = _first(fits, heights, center_height)
        width = _first(fits, widths, center_width)
        any_fits = fits.any(0)
        top = torch.where(
            any_fits, _draw_start(full_height, height), (full_height - center_height) // 2
        )
        left = torch.where(
            any_fits, _draw_start(full_width, width), (full_width - center_width) // 2
        )
        return {"top": top, "left": left, "height": height, "width": width}

    def _center_size(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of the largest crop whose ratio is allowed."""
        if width / height < self.ratio[0]:
            return round(width / self.ratio[0]), width
        if width / height > self.ratio[1]:
            return height, round(height * self.ratio[1])
        return height, width

    def transform(self, images: Tensor, params: Params) -> Tensor:
        if images.is_cpu:
            return self._crop_one_by_one(images, params)
        crops = resized_crop(to_unit(images), **params, size=self.size, antialias=self.antialias)
        return from_unit(crops, images.dtype)

    def _crop_one_by_one(self, images: Tensor, params: Params) -> Tensor:
        shape = (len(images), images.shape[1], *self.size)
        crops = torch.empty(shape, dtype=images.dtype, memory_format=torch.channels_last)
        boxes = torch.stack([params[name] for name in BOX], 1).int()
        images = images if images.dtype == torch.uint8 else images.to(torch.float32)
        for_chunks(self._crop_chunk, chunk_size(images), crops, images, boxes)
        return crops

    def _crop_chunk(self, crops: Tensor, images: Tensor, boxes: Tensor) -> None:
        rows = zip(crops, images, boxes.tolist(), strict=True)
        for crop, image, (top, left, height, width) in rows:
            part = image[None, :, top : top + height, left : left + width]
            part = part.contiguous(memory_format=torch.channels_last)  # the fast case of the kernel
            crop.copy_(
                F.interpolate(part, self.size, None, "bilinear", antialias=self.antialias)[0]
            )

    def transform_masks(self, masks: Tensor, params: Params, outside: int) -> Tensor:  # noqa: ARG002
        rows = _nearest_pixel(params["top"], params["height"], self.size[0])
        columns = _nearest_pixel(params["left"], params["width"], self.size[1])
        sample = torch.arange(len(masks), device=masks.device)[:, None, None]
        return masks[sample, 0, rows[:, :, None], columns[:, None, :]][:, None]


def _nearest_pixel(start: Tensor, length: Tensor, out: int) -> Tensor:
    """Return the input pixel of each output pixel, (N, out), as `nearest` of torch chooses it."""
    offset = (torch.arange(out, device=start.device) * (length / out)[:, None]).floor()
    return (start[:, None] + torch.minimum(offset, length[:, None] - 1)).long()


def resized_crop(
    images: Tensor,
    top: Tensor,
    left: Tensor,
    height: Tensor,
    width: Tensor,
    size: tuple[int, int],
    antialias: bool,
) -> Tensor:
    """Crop and resize each image to its own box.

    Args:
        images: Floats of shape (N, C, H, W).
        top: First row of each box, of shape (N,).
        left: First column of each box.
        height: Number of rows of each box.
        width: Number of columns of each box.
        size: Height and width of the result.
        antialias: Whether to widen the filter by the factor by which a box shrinks.
    """
    rows = _resize_weights(top, height, images.shape[-2], size[0], antialias)
    columns = _resize_weights(left, width, images.shape[-1], size[1], antialias)
    narrow = (images.flatten(1, 2) @ columns.mT).unflatten(1, images.shape[1:3])
    return torch.matmul(rows[:, None], narrow)


def _resize_weights(start: Tensor, length: Tensor, full: int, out: int, antialias: bool) -> Tensor:
    """Return the weight of each input pixel in each output pixel, of shape (N, out, full)."""
    scale = (length / out)[:, None, None]
    support = scale.clamp(min=1) if antialias else 1
    start, end = start[:, None, None], (start + length)[:, None, None]
    center = start + scale * (torch.arange(out, device=start.device) + 0.5)[:, None]
    pixel = torch.arange(full, device=start.device) + 0.5
    weights = (1 - (pixel - center).abs() / support).clamp(min=0)
    weights = weights * ((pixel > start) & (pixel < end))
    return weights / weights.sum(-1, keepdim=True)


class RandomShift(Augmentation):
    """Shift each image by a random offset and fill with zeros.

    Equivalent to a random crop of the original size after zero padding.

    Args:
        pixels: Maximum offset along each axis, in both directions.
    """

    in_float = False
    same_on_bytes = True

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.pixels = check_integer("pixels", pixels, 1)

    def make_params(self, images: Tensor) -> Params:
        shape = (2, len(images))
        rows, columns = torch.randint(0, 2 * self.pixels + 1, shape, device=images.device)
        return {"row": rows, "column": columns}

    def transform(self, images: Tensor, params: Params) -> Tensor:
        return self._shift(images, params, 0)

    def transform_masks(self, masks: Tensor, params: Params, outside: int) -> Tensor:
        return self._shift(masks, params, outside)

    def _shift(self, images: Tensor, params: Params, fill: int) -> Tensor:
        count, _, height, width = images.shape
        padded = F.pad(images, [self.pixels] * 4, value=fill).permute(0, 2, 3, 1)
        rows = params["row"][:, None] + torch.arange(height, device=images.device)
        columns = params["column"][:, None] + torch.arange(width, device=images.device)
        sample = torch.arange(count, device=images.device)[:, None, None]
        shifted = padded[sample, rows[:, :, None], columns[:, None, :]]
        return shifted.permute(0, 3, 1, 2).contiguous()


class RandomHorizontalFlip(Augmentation):
    """Mirror each image left to right with a probability.

    Args:
        p: The probability.
    """

    in_float = False
    same_on_bytes = True
    axis = -1

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = check_probability("p", p)

    def make_params(self, images: Tensor) -> Params:
        return {"mask": bernoulli(images, self.p)}

    def transform(self, images: Tensor, params: Params) -> Tensor:  # noqa: ARG002
        return images.flip(self.axis)

    def transform_masks(self, masks: Tensor, params: Params, outside: int) -> Tensor:  # noqa: ARG002
        return masks.flip(self.axis)


class RandomVerticalFlip(RandomHorizontalFlip):
    """Turn each image upside down with a probability.

    Args:
        p: The probability.
    """

    axis = -2


class RandomFlip(RandomHorizontalFlip):
    """`RandomHorizontalFlip` under the name that saved configurations have.

    Args:
        probability: Between 0 and 1.
    """

    def __init__(self, probability: float = 0.5) -> None:
        super().__init__(check_probability("probability", probability))


class RandomAffine(Augmentation):
    """Rotate, translate, scale and shear each image about its center.

    Args:
        degrees: Range of the rotation, clockwise; a number stands for both directions.
        translate: Largest horizontal and vertical translation, as fractions of width and height.
        scale: Range of the scale.
        shear: Range of the horizontal shear in degrees; a number stands for both directions. Four
            numbers also give the range of the vertical shear.
        interpolation: `nearest` or `bilinear`.
        fill: Value in [0, 1] outside of the image, also for uint8.
    """

    def __init__(
        self,
        degrees: float | Sequence[float] = 0.0,
        translate: Sequence[float] = (0.0, 0.0),
        scale: Sequence[float] = (1.0, 1.0),
        shear: float | Sequence[float] = 0.0,
        interpolation: str = "nearest",
        fill: float = 0.0,
    ) -> None:
        super().__init__()
        self.degrees = check_spread("degrees", degrees, 0, -360, 360)
        self.translate = tuple(check_probability("translate", value) for value in translate)
        if len(self.translate) != 2:
            raise ValueError(f"translate={translate!r} is not valid; allowed: two numbers")
        self.scale = check_interval("scale", scale, 1e-3, 1e3)
        ranges = [shear[:2], shear[2:] or 0.0] if isinstance(shear, Sequence) else [shear, 0.0]
        self.shear = [check_spread("shear", value, 0, -89, 89) for value in ranges]
        self.interpolation = check_interpolation(interpolation)
        self.fill = check_probability("fill", fill)

    def make_params(self, images: Tensor) -> Params:
        spans = [
            share * size
            for share, size in zip(
                self.translate, (images.shape[-1], images.shape[-2]), strict=True
            )
        ]
        return {
            "angle": uniform(images, self.degrees),
            "translate": torch.stack([uniform(images, (-s, s)).round() for s in spans], 1),
            "scale": uniform(images, self.scale),
            "shear": torch.stack([uniform(images, interval) for interval in self.shear], 1),
        }

    def transform(self, images: Tensor, params: Params) -> Tensor:
        matrix = inverse_affine_matrix(**params)
        return warp(images, matrix, self.interpolation, self.fill)

    def transform_masks(self, masks: Tensor, params: Params, outside: int) -> Tensor:
        matrix = inverse_affine_matrix(**params)
        return warp(masks.float(), matrix, "nearest", outside).round_().to(masks.dtype)


def check_interpolation(value: str) -> str:
    """Return the interpolation mode of `warp`.

    Raises:
        ValueError: There is no such mode.
    """
    if value not in INTERPOLATIONS:
        allowed = ", ".join(INTERPOLATIONS)
        raise ValueError(f"interpolation={value!r} is not valid; allowed: {allowed}")
    return value


def inverse_affine_matrix(
    angle: Tensor, translate: Tensor, scale: Tensor, shear: Tensor, center: Tensor | None = None
) -> Tensor:
    """Return the maps from output to input pixels, of shape (N, 2, 3).

    Coordinates are relative to the center of the image. The formula is that of
    `torchvision.transforms.v2.functional.affine`.

    Args:
        angle: Degrees, clockwise, of shape (N,).
        translate: Pixels to the right and down, of shape (N, 2).
        scale: Shape (N,).
        shear: Degrees along x and y, of shape (N, 2).
        center: Fixed point of rotation, scale and shear, of shape (N, 2); None is the center.
    """
    angle, (shear_x, shear_y) = torch.deg2rad(angle), torch.deg2rad(shear).unbind(1)
    a = torch.cos(angle - shear_y) / torch.cos(shear_y)
    b = -(a * torch.tan(shear_x) + torch.sin(angle))
    c = torch.sin(angle - shear_y) / torch.cos(shear_y)
    d = torch.cos(angle) - c * torch.tan(shear_x)
    linear = torch.stack([d, -b, -c, a], 1).unflatten(1, (2, 2)) / scale[:, None, None]
    center = torch.zeros_like(translate) if center is None else center
    offset = center[:, :, None] - linear @ (center + translate)[:, :, None]
    return torch.cat([linear, offset], 2)


def warp(images: Tensor, matrix: Tensor, interpolation: str, fill: float) -> Tensor:
    """Sample each image where its matrix maps the pixels of the result.

    Args:
        images: Floats of shape (N, C, H, W).
        matrix: The result of `inverse_affine_matrix`.
        interpolation: `nearest` or `bilinear`.
        fill: Value outside of the image.
    """
    height, width = images.shape[-2:]
    y = torch.arange(height, device=images.device)[:, None] + (0.5 - height / 2)
    x = torch.arange(width, device=images.device) + (0.5 - width / 2)
    m = matrix[..., None, None]
    grid_x = (m[:, 0, 0] * x + m[:, 0, 1] * y + m[:, 0, 2]) / (width / 2)
    grid_y = (m[:, 1, 0] * x + m[:, 1, 1] * y + m[:, 1, 2]) / (height / 2)
    grid = torch.stack([grid_x, grid_y], 3)
    return F.grid_sample(images - fill, grid, interpolation, "zeros", align_corners=False) + fill


class RandomErasing(Augmentation):
    """Erase a random rectangle of each image with a probability.

    Args:
        p: The probability.
        scale: Range of the area of the rectangle, relative to the image.
        ratio: Range of the height of the rectangle divided by its width.
        value: What erased pixels get: a number in [0, 1], also for uint8, or `random` for noise
            that is uniform in [0, 1].
    """

    keeps_masks = True
    in_float = False

    def __init__(
        self,
        p: float = 0.5,
        scale: Sequence[float] = (0.02, 0.33),
        ratio: Sequence[float] = (0.3, 3.3),
        value: float | str = 0.0,
    ) -> None:
        super().__init__()
        self.p = check_probability("p", p)
        self.scale = check_interval("scale", scale, 0, 1)
        self.ratio = check_interval("ratio", ratio, 1e-3, 1e3)
        if value != "random" and not (isinstance(value, (int, float)) and 0 <= value <= 1):
            raise ValueError(f"value={value!r} is not valid; allowed: random, a number from 0 to 1")
        self.value = value

    def make_params(self, images: Tensor) -> Params:
        full_height, full_width = images.shape[-2:]
        widths, heights = _draw_sizes(images, self.scale, self.ratio)
        fits = (heights < full_height) & (widths < full_width)
        height, width = _first(fits, heights, 0), _first(fits, widths, 0)
        top, left = _draw_start(full_height, height), _draw_start(full_width, width)
        params = {"top": top, "left": left, "height": height, "width": width}
        params["mask"] = bernoulli(images, self.p) & fits.any(0)
        if isinstance(self.value, str):
            params["noise"] = torch.rand_like(images, dtype=torch.float32)
        return params

    def transform(self, images: Tensor, params: Params) -> Tensor:
        top, left = per_pixel(params["top"]), per_pixel(params["left"])
        row = torch.arange(images.shape[-2], device=images.device)[:, None]
        column = torch.arange(images.shape[-1], device=images.device)
        in_rows = (row >= top) & (row < top + per_pixel(params["height"]))
        in_columns = (column >= left) & (column < left + per_pixel(params["width"]))
        value: Tensor | float
        if isinstance(self.value, str):
            value = from_unit(params["noise"], images.dtype)
        else:
            value = round(self.value * 255) if images.dtype == torch.uint8 else self.value
        return torch.where(in_rows & in_columns, value, images)


def _draw_sizes(
    images: Tensor, scale: Sequence[float], ratio: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Draw sides of boxes, each of shape (ATTEMPTS, N).

    Args:
        images: Images of shape (N, C, H, W).
        scale: Range of the area, relative to the image.
        ratio: Range of the second side divided by the first.
    """
    draws = torch.empty(2, ATTEMPTS, len(images), device=images.device)
    area = draws[0].uniform_(*scale) * (images.shape[-2] * images.shape[-1])
    ratios = draws[1].uniform_(math.log(ratio[0]), math.log(ratio[1])).exp()
    return (area / ratios).sqrt().round(), (area * ratios).sqrt().round()


def _first(fits: Tensor, values: Tensor, default: float) -> Tensor:
    """Return the first of each image's values that fits, or the default, of shape (N,)."""
    first = fits.int().argmax(0, keepdim=True)
    return torch.where(fits.any(0), values.gather(0, first)[0], default)


def _draw_start(full: int, length: Tensor) -> Tensor:
    """Draw where a box begins; all positions inside of the image are equally likely."""
    free = full - length
    return torch.minimum((torch.rand_like(length) * (free + 1)).floor(), free)
