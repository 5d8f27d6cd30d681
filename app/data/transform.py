"""Transforms of samples and batches into the inputs of the model; statistics to normalize them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset
from torchvision.transforms import v2

from app.data.augment import Augmentation, PerSample, RandomResizedCrop, draws_once_per_batch
from app.data.batch import Inputs, Masks, map_inputs
from app.data.joint import transform_both
from app.data.rows import chunk_size, for_chunks
from app.runtime.errors import UserError
from app.runtime.nested import Key, Nested, map_tensors, pick

Augment = Callable[[Tensor], Tensor]
ROWS_AT_ONCE = 256  # of an array that is measured


@dataclass(frozen=True)
class SampleTransform:
    """Applies the transforms of a stage to the inputs of one sample, and to its mask.

    Attributes:
        transforms: Applied in order.
        inputs: Key or keys of the inputs within a sample; None for the entire sample.
        masks: The masks that are transformed together with the inputs; None if there are none.
    """

    transforms: Sequence[Augment]
    inputs: Inputs
    masks: Masks | None = None

    def __call__(self, sample: Nested) -> Nested:
        if self.masks is None:
            return map_inputs(self._apply, sample, self.inputs)
        image, mask = pick(sample, self.inputs), pick(sample, self.masks.key)
        for transform in self.transforms:
            image, mask = transform_both(transform, image, mask, self.masks.outside)
        return self.masks.replace_both(sample, self.inputs, image, mask)

    def _apply(self, value: Any) -> Any:
        if isinstance(value, (tuple, list, dict)):
            return map_tensors(self._apply, value)
        for transform in self.transforms:
            value = transform(value)
        return value


class TransformedDataset(Dataset[Any]):
    """A map-style dataset whose samples are transformed when they are read."""

    def __init__(self, dataset: Dataset[Any], transform: Callable[[Nested], Nested]) -> None:
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        return self.transform(self.dataset[index])


class TransformedStream(IterableDataset[Any]):
    """An iterable dataset whose samples are transformed when they are read."""

    def __init__(self, dataset: IterableDataset[Any], transform: SampleTransform) -> None:
        self.dataset, self.transform = dataset, transform
        if hasattr(dataset, "set_epoch"):
            self.set_epoch = dataset.set_epoch

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return map(self.transform, self.dataset)


def transform_samples(
    dataset: Dataset[Any],
    transforms: Sequence[Augment],
    inputs: Inputs,
    masks: Masks | None = None,
) -> Dataset[Any]:
    """Return the dataset with transformed inputs, of either style; itself without transforms."""
    if not transforms:
        return dataset
    transform = SampleTransform(transforms, inputs, masks)
    if isinstance(dataset, IterableDataset):
        return TransformedStream(dataset, transform)
    return TransformedDataset(dataset, transform)


class ResizeCenterCrop(v2.Compose):  # type: ignore[misc]  # torchvision has no types
    """Resize the shorter side of images to `size / ratio`, and cut out the square in the middle.

    This is how torchvision and timm (with `ratio` as `crop_pct`) evaluate their published weights.

    Args:
        size: Height and width of the result, in pixels.
        ratio: Part of the shorter side that is kept, above 0 and at most 1; None keeps all of it.
    """

    def __init__(self, size: int, ratio: float | None = None) -> None:
        if ratio is not None and not 0 < ratio <= 1:
            raise ValueError(f"ratio={ratio} must be above 0 and at most 1")
        side = resized_side(size, ratio)
        super().__init__([v2.Resize(side, antialias=True), v2.CenterCrop(size)])
        self.needed_side = 2 * side  # of images: with twice the length, the result is the same


def resized_side(size: int, ratio: float | None) -> int:
    """Return the length of the shorter side from which evaluation crops `size` pixels."""
    return math.floor(size / (ratio or 1))


def for_batches(transform: Augment) -> Augment:
    """Return a transform of single samples as one of batches, (N, ...), in the same order.

    Random transforms of torchvision would draw once for all samples of a batch, and a function of
    the user expects a single one: they are called for each sample. Deterministic ones and those of
    this program take the whole batch.
    """
    return transform if _takes_batches(transform) else PerSample(transform)


def _takes_batches(transform: Augment) -> bool:
    is_known = type(transform).__module__.startswith(("app.data.", "torchvision.transforms."))
    return is_known and not draws_once_per_batch(transform)


@dataclass(frozen=True)
class BatchTransform:
    """Scales bytes to [0, 1], resizes, augments, normalizes, and sets channels and memory format.

    Attributes:
        mean: Per channel, on the device; None skips normalization.
        std: Per channel, on the device; None skips normalization.
        size: Height and width in pixels to resize to, or None.
        channels: Number of channels of the result, or None to keep it.
        memory_format: Memory format of the result, if it is a batch of images.
        transforms: Transforms of the stage, applied first, to the stored values; empty if the
            samples of the batch have been transformed already.
        augment: Augmentations of values in [0, 1], applied in order.
    """

    mean: Tensor | None
    std: Tensor | None
    size: int | None
    channels: int | None
    memory_format: torch.memory_format
    transforms: Sequence[Augment] = ()
    augment: Sequence[Augment] = ()

    @property
    def is_deterministic(self) -> bool:
        """Whether an image gives the same result in any batch; unknown for further transforms."""
        return not self.transforms and not self.augment

    def __call__(self, x: Tensor) -> Tensor:
        """Transform a uint8 or float batch to float32; other integer tensors are returned as is."""
        return self.transform_both(x, None, 0)[0]

    def transform_both(
        self, x: Tensor, masks: Tensor | None, outside: int
    ) -> tuple[Tensor, Tensor | None]:
        """Transform a batch, and its masks in the same way; arguments of `joint.transform_both`."""
        on_bytes, on_floats = self._split_augment
        transforms, is_normalized = self.transforms, False
        if masks is None and x.dtype == torch.uint8 and (crops := _only_crop(transforms)):
            on_bytes, transforms = (*crops, *on_bytes), ()
        for transform in transforms:
            x, masks = transform_both(transform, x, masks, outside)
        if not (x.dtype == torch.uint8 or x.is_floating_point()):
            return x, masks
        # Operations below are in place: allocating a tensor for each one would dominate the cost.
        if x.dtype == torch.uint8:
            for step in () if masks is None else on_bytes:
                x, masks = transform_both(step, x, masks, outside)
            is_normalized = self._resize is None and not on_floats and self._fits(x)
            x = self._to_floats(x, on_bytes if masks is None else (), is_normalized)
        else:
            x, on_floats = x.clone(), self.augment
        if self._resize is not None:
            x, masks = transform_both(self._resize, x, masks, outside)
        for augment in on_floats:
            x, masks = transform_both(augment, x, masks, outside)
        return self._finish(x, is_normalized), masks

    def _to_floats(self, x: Tensor, augment: Sequence[Augmentation], normalize: bool) -> Tensor:
        """Augment bytes, and return them as floats in [0, 1], laid out for the model.

        What moves pixels comes before they are floats, which have four times the size. On the CPU,
        a core does all of it with a few images, which stay in its cache.

        Args:
            x: The bytes.
            augment: Augmentations of bytes; only the first may change the size of images.
            normalize: Whether to normalize the result.
        """
        layout = self.memory_format if x.ndim == 4 else torch.preserve_format
        if not x.is_cpu or x.ndim != 4:
            for step in augment:
                x = step(x)
            floats = x.to(torch.float32, memory_format=layout).div_(255)
            return self._normalize(floats) if normalize else floats
        params = [step.make_params(x) for step in augment]
        crops = _only_crop(augment[:1])
        size = crops[0].size if crops else x.shape[2:]
        floats = _empty_floats((*x.shape[:2], *size), layout)

        def convert(floats: Tensor, x: Tensor, *drawn: Tensor) -> None:
            values = iter(drawn)
            for step, names in zip(augment, params, strict=True):
                x = step.apply_params(x, {name: next(values) for name in names})
            floats.copy_(x).div_(255)
            if normalize:
                self._normalize(floats)

        drawn = [value for values in params for value in values.values()]
        # Threads wait for each other at every line of Python, and larger chunks have fewer.
        for_chunks(convert, 2 * chunk_size(floats, 1), floats, x, *drawn)
        return floats

    def _fits(self, x: Tensor) -> bool:
        """Return whether images have as many channels as there are means and deviations."""
        if self.mean is None or self.std is None:
            return True
        return x.ndim != 4 or max(len(self.mean), len(self.std)) in (1, x.shape[1])

    def _finish(self, x: Tensor, is_normalized: bool) -> Tensor:
        if not is_normalized:
            if not self._fits(x):
                x = self._match_statistics(x)
            if x.is_cpu and x.ndim == 4:
                for_chunks(self._normalize, chunk_size(x, 1), x)
            else:
                self._normalize(x)
        if x.ndim != 4:
            return x
        if self.channels is not None and x.shape[1] != self.channels:
            x = self._convert_channels(x)
        return x.contiguous(memory_format=self.memory_format)

    def _normalize(self, x: Tensor) -> Tensor:
        """Normalize in place, and return the result."""
        mean, std = self.mean, self.std
        if mean is None or std is None:
            return x
        if not x.is_cpu or x.ndim != 4 or not x.is_contiguous(memory_format=torch.channels_last):
            return x.sub_(mean).div_(std)
        # Rows of pixels: torch would loop over the three channels of each pixel instead
        channels, _, width = x.shape[1:]
        mean, std = (v.flatten().expand(channels).repeat(width) for v in (mean, std))
        x.permute(0, 2, 3, 1).flatten(2).sub_(mean).div_(std)
        return x

    @cached_property
    def _split_augment(self) -> tuple[Sequence[Augmentation], Sequence[Augment]]:
        """The first augmentations that give the same result on bytes, and the others."""
        first: list[Augmentation] = []
        for step in self.augment if self.size is None else ():
            if not (isinstance(step, Augmentation) and step.same_on_bytes):
                break
            first.append(step)
        return first, self.augment[len(first) :]

    @cached_property
    def _resize(self) -> Augment | None:
        return v2.Resize([self.size, self.size], antialias=True) if self.size else None

    def _match_statistics(self, x: Tensor) -> Tensor:
        """Convert images before they are normalized, if the statistics are of the result."""
        assert self.mean is not None and self.std is not None
        count = max(len(self.mean), len(self.std))
        if count != self.channels:
            raise UserError(
                f"data.normalize has {count} values, but the images have {x.shape[1]} channels"
            )
        return self._convert_channels(x).contiguous(memory_format=self.memory_format)

    def _convert_channels(self, x: Tensor) -> Tensor:
        if (x.shape[1], self.channels) == (1, 3):
            return x.expand(-1, 3, -1, -1)
        if (x.shape[1], self.channels) == (3, 1):
            gray: Tensor = v2.functional.rgb_to_grayscale(x)
            return gray
        raise UserError(
            f"data.channels={self.channels}, but the images have {x.shape[1]}; allowed "
            "conversions: 1 to 3 and 3 to 1"
        )


def _only_crop(transforms: Sequence[Augment]) -> list[RandomResizedCrop]:
    """Return the random crop if there is no other transform."""
    return [t for t in transforms if isinstance(t, RandomResizedCrop) and len(transforms) == 1]


def _empty_floats(shape: Sequence[int], memory_format: torch.memory_format) -> Tensor:
    """Return a new float32 tensor of images in huge pages of memory, where the system has them.

    numpy asks for them. Getting a batch page by page takes as long as computing it.
    """
    count, channels, height, width = shape
    if memory_format == torch.channels_last:
        pixels = np.empty((count, height, width, channels), np.float32)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return torch.from_numpy(np.empty(shape, np.float32))


def channel_statistics(
    dataset: Dataset[Any], inputs: Key = 0, rows: Tensor | None = None
) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel (images) or column (tables).

    Bytes are scaled to [0, 1] first. A standard deviation of 0 is returned as 1.

    Args:
        dataset: A dataset in memory.
        inputs: Key of the inputs among its tensors.
        rows: The samples to measure, int64 of shape (N,); None measures all.

    Raises:
        UserError: The dataset is not in memory, or there are several inputs.
    """
    check_in_memory(dataset)
    assert isinstance(dataset, TensorDataset)
    x = pick(dataset.tensors, inputs)
    if not isinstance(x, Tensor):
        raise UserError(
            f"data.normalize=auto needs a single input, not data.inputs={inputs!r}; set "
            "data.normalize.mean and std"
        )
    if x.dtype == torch.uint8 and x.ndim > 1:
        mean, variance = _moments_of_bytes(x, torch.arange(len(x)) if rows is None else rows)
    else:
        values = (x if rows is None else x[rows]).double()
        dims = [d for d in range(x.ndim) if d != 1]
        mean, variance = values.mean(dims), values.var(dims, correction=0)
    std = variance.sqrt()
    return mean.tolist(), torch.where(std > 0, std, torch.ones_like(std)).tolist()


def check_in_memory(dataset: Dataset[Any]) -> None:
    """Check that a dataset can be measured without reading it sample by sample.

    Raises:
        UserError: It cannot.
    """
    if not isinstance(dataset, TensorDataset):
        raise UserError(
            "data.normalize=auto needs a dataset in memory, or data.cache for image files; set "
            "data.normalize.mean and std, or data.normalize=null"
        )


def _moments_of_bytes(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each channel of some rows, exactly, from how often bytes occur.

    Arrays that are larger than the memory are read once, in pieces.
    """
    counts = torch.zeros(x.shape[1], 256, dtype=torch.int64)
    for piece in rows.split(ROWS_AT_ONCE):
        for channel, values in enumerate(x[piece].unbind(1)):
            counts[channel] += torch.bincount(values.flatten(), minlength=256)
    levels, weights = torch.arange(256).double() / 255, counts.double() / counts.sum(1, True)
    mean = weights @ levels
    return mean, (weights * (levels - mean[:, None]).square()).sum(1)
