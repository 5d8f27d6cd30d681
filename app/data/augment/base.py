"""What augmentations have in common: shapes, dtypes, random draws and checks of arguments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from app.data.rows import chunk_size, for_chunks, select_rows
from app.runtime.errors import UserError

Interval = tuple[float, float]
Params = dict[str, Tensor]


class Augmentation(nn.Module, ABC):
    """Base class of augmentations that draw their parameters for each image.

    Takes images of shape (C, H, W) or (N, C, H, W), uint8 or floats in [0, 1], and returns the same
    dtype; the input is not modified, but returned if nothing is to be done. Random numbers come
    from the default generator of the device that the images are on, and nothing is read from the
    device.

    A subclass overrides `make_params` and `transform`, as transforms of torchvision do, and
    `transform_masks` if it moves pixels and is used with masks.

    Attributes:
        in_float: Whether `transform` receives a float32 copy with values in [0, 1]; otherwise it
            receives the images as they are.
        in_chunks: Whether the CPU transforms a batch in pieces that fit into its cache, in threads;
            `transform` must not change the shape then.
        same_on_bytes: Whether bytes give the same result as floats in [0, 1], so that the
            augmentation can come before the conversion, where it moves a quarter of the memory.
        keeps_masks: Whether pixels stay where they are, so that masks do not change.
    """

    in_float: ClassVar[bool] = True
    in_chunks: ClassVar[bool] = True
    same_on_bytes: ClassVar[bool] = False
    keeps_masks: ClassVar[bool] = False

    def forward(self, images: Tensor) -> Tensor:
        """Augment one image or a batch.

        Raises:
            UserError: The shape or the dtype is not that of images.
        """
        self._check(images)
        batch = images if images.ndim == 4 else images[None]
        result = self._augment_chunks(batch, self.make_params(batch))
        return result if images.ndim == 4 else result[0]

    def transform_both(
        self, images: Tensor, masks: Tensor, outside: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Augment images, and move the pixels of their masks in the same way.

        Args:
            images: One image or a batch.
            masks: Labels of shape (H, W) or (N, H, W), of an integer dtype, which is kept.
            outside: Label of pixels outside of the image.

        Raises:
            UserError: The shape or the dtype is not that of images, or the augmentation moves
                pixels in a way that it does not know for masks.
        """
        self._check(images)
        if self.keeps_masks:
            return self(images), masks
        is_batch = images.ndim == 4
        batch, labels = (images, masks) if is_batch else (images[None], masks[None])
        params = self.make_params(batch)

        def move(selected: Tensor, values: Params) -> Tensor:
            return self.transform_masks(selected, values, outside)

        moved = _transform_selected(move, labels[:, None], params)[:, 0]
        result = self._augment_chunks(batch, params)
        return (result, moved) if is_batch else (result[0], moved[0])

    def _check(self, images: Tensor) -> None:
        if images.ndim not in (3, 4):
            raise UserError(
                f"{type(self).__name__}: images of shape {tuple(images.shape)} are not valid; "
                "allowed: (C, H, W) or (N, C, H, W)"
            )
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise UserError(
                f"{type(self).__name__}: images of dtype {images.dtype} are not valid; "
                "allowed: uint8, or floats in [0, 1]"
            )

    def _augment_chunks(self, batch: Tensor, params: Params) -> Tensor:
        size = chunk_size(batch, 4 if self.in_float else None)
        if not (self.in_chunks and batch.is_cpu) or len(batch) <= size:
            return self.apply_params(batch, params)
        result = torch.empty_like(batch)

        def augment_chunk(target: Tensor, images: Tensor, *values: Tensor) -> None:
            own = dict(zip(params, values, strict=True))
            target.copy_(self.apply_params(images, own))

        for_chunks(augment_chunk, size, result, batch, *params.values())
        return result

    def apply_params(self, images: Tensor, params: Params) -> Tensor:
        """Transform images of shape (N, C, H, W) by parameters that `make_params` has drawn."""
        return _transform_selected(self._in_float, images, params)

    def _in_float(self, images: Tensor, params: Params) -> Tensor:
        if not self.in_float:
            return self.transform(images, params)
        return from_unit(self.transform(to_unit(images), params), images.dtype)

    @abstractmethod
    def make_params(self, images: Tensor) -> Params:
        """Draw parameters for images of shape (N, C, H, W); the first dimension of each is N.

        A parameter `mask` selects the images that `transform` is for; the others stay.
        """

    @abstractmethod
    def transform(self, images: Tensor, params: Params) -> Tensor:
        """Transform images of shape (N, C, H, W) by the parameters of each; draw nothing.

        Threads call it for parts of a batch at once.
        """

    def transform_masks(self, masks: Tensor, params: Params, outside: int) -> Tensor:  # noqa: ARG002
        """Transform masks of shape (N, 1, H, W) by the parameters of each, to the nearest label."""
        name = type(self).__name__
        raise UserError(
            f"{name} moves pixels of images, and cannot move those of masks; allowed with masks: "
            "flips, RandomShift, RandomAffine, RandomResizedCrop, and what only changes colors"
        )


def _transform_selected(
    transform: Callable[[Tensor, Params], Tensor], images: Tensor, params: Params
) -> Tensor:
    """Transform the images that the parameter `mask` selects, or all if there is none."""
    params = dict(params)
    mask = params.pop("mask", None)
    if mask is None:
        return transform(images, params)

    def transform_some(selected: Tensor, *values: Tensor) -> Tensor:
        return transform(selected, dict(zip(params, values, strict=True)))

    return transform_where(mask, transform_some, images, *params.values())


def to_unit(images: Tensor) -> Tensor:
    """Return a float32 copy with values in [0, 1]."""
    if images.dtype == torch.uint8:
        return images.to(torch.float32).div_(255)
    return images.to(torch.float32, copy=True)


def from_unit(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert floats in [0, 1] to another dtype; uint8 is rounded."""
    return images.mul(255).round_().to(dtype) if dtype == torch.uint8 else images.to(dtype)


def uniform(images: Tensor, interval: Interval) -> Tensor:
    """Draw a number for each image; the result has shape (N,)."""
    return torch.empty(len(images), device=images.device).uniform_(*interval)


def bernoulli(images: Tensor, p: float) -> Tensor:
    """Draw for each image whether something happens, with probability `p`."""
    return torch.rand(len(images), device=images.device) < p


def transform_where(
    mask: Tensor, function: Callable[..., Tensor], images: Tensor, *params: Tensor
) -> Tensor:
    """Return `function(images, *params)` for images in the mask, and the others unchanged.

    On the CPU, only images in the mask are transformed. On other devices all are, because the host
    would have to wait for the device to learn how many there are.

    Args:
        mask: Shape (N,).
        function: Must not change the shape of the images.
        images: Shape (N, C, H, W).
        *params: First dimension N.
    """
    if not images.is_cpu:
        return torch.where(per_pixel(mask), function(images, *params), images)
    rows = mask.nonzero()[:, 0]
    if len(rows) == 0:
        return images
    if len(rows) == len(images):
        return function(images, *params)
    transformed = function(select_rows(images, rows), *(values[rows] for values in params))
    result = images.clone()
    for row, image in zip(rows.tolist(), transformed, strict=True):
        result[row].copy_(image)  # index operations copy element by element
    return result


def per_pixel(values: Tensor) -> Tensor:
    """Reshape (N,) to (N, 1, 1, 1)."""
    return values[:, None, None, None]


def check_probability(name: str, value: float) -> float:
    """Return a probability.

    Raises:
        ValueError: It is not between 0 and 1.
    """
    if not (_is_number(value) and 0 <= value <= 1):
        raise ValueError(f"{name}={value!r} is not valid; allowed: a number from 0 to 1")
    return value


def check_integer(name: str, value: int, low: int, high: int | None = None) -> int:
    """Return an integer.

    Raises:
        ValueError: It is not an integer in this range.
    """
    if not isinstance(value, int) or value < low or (high is not None and value > high):
        upper = "" if high is None else f" and at most {high}"
        raise ValueError(
            f"{name}={value!r} is not valid; allowed: an integer, at least {low}{upper}"
        )
    return value


def check_interval(name: str, value: Sequence[float], low: float, high: float) -> Interval:
    """Return an interval (min, max).

    Raises:
        ValueError: It is not two increasing numbers between `low` and `high`.
    """
    is_pair = isinstance(value, Sequence) and len(value) == 2 and all(map(_is_number, value))
    if not (is_pair and low <= value[0] <= value[1] <= high):
        raise ValueError(
            f"{name}={value!r} is not valid; allowed: [min, max] between {low:g} and {high:g}"
        )
    return float(value[0]), float(value[1])


def check_spread(
    name: str, value: float | Sequence[float], center: float, low: float, high: float
) -> Interval:
    """Return an interval that is given by its bounds, or by its distance from the center.

    Raises:
        ValueError: It is neither, or not between `low` and `high`.
    """
    if isinstance(value, Sequence):
        return check_interval(name, value, low, high)
    if not (_is_number(value) and 0 <= value <= high - center):
        raise ValueError(
            f"{name}={value!r} is not valid; allowed: a number from 0 to {high - center:g}, "
            f"or [min, max] between {low:g} and {high:g}"
        )
    return max(center - value, low), center + value


def check_size(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """Return (height, width); a single number stands for both.

    Raises:
        ValueError: They are not positive integers.
    """
    sizes = (value, value) if isinstance(value, int) else tuple(value)
    if len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(
            f"{name}={value!r} is not valid; allowed: a positive integer, or [height, width]"
        )
    return sizes[0], sizes[1]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))
