"""Images decoded once into arrays: in memory, or in a file that ranks, runs and sweeps share."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from app.data.images import with_needed_side
from app.data.progress import show_progress
from app.data.rows import thread_pool
from app.data.split import base_dataset, innermost
from app.distributed.collectives import rank
from app.runtime.errors import StorageError, UserError, as_user_error
from app.runtime.fault_injection import maybe_crash
from app.runtime.files import atomic_write, storage_error
from app.runtime.lock import file_lock

log = logging.getLogger(__name__)
VERSION = "1"  # of the pixels in a cache file; to be raised when they change
BLOCK = 1024  # images that are decoded before all of them have been stored

Shapes = dict[str, tuple[int, ...]]  # of the arrays: images (N, H, W, C), and masks (N, H, W)


@runtime_checkable
class CacheableImages(Protocol):
    """A dataset of (image, target) samples, uint8 of shape (C, H, W), that can be kept in arrays.

    With the attribute `has_masks`, targets are kept, too: uint8 of shape (H, W). Otherwise the
    attribute `targets` has the label of each sample.

    Attributes:
        location: Where the images come from, such as their folder.
    """

    location: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, Any]: ...

    def fingerprint(self) -> str:
        """Return a text that changes when an image or mask is changed, added or removed."""


@dataclass(frozen=True)
class FitImage:
    """Resizes an image, or its mask, until it covers a size, and cuts out the middle.

    An image whose shorter side has been resized to 256 pixels, as for evaluation, is not resized
    again by `FitImage(256, 256, ...)`.

    Attributes:
        height: Height of the result.
        width: Width of the result.
        inner: Size of the centre crops that shall contain the same pixels when they are taken from
            the result instead of the entire image. This decides how half pixels are rounded; sizes
            that differ by a multiple of 4 are equivalent.
        stretch: Whether to resize to exactly this size, and to cut nothing off.
    """

    height: int
    width: int
    inner: int = 0
    stretch: bool = False

    @property
    def needed_side(self) -> int:
        """Length of the shorter side of an image that suffices: with it, the result is the same."""
        return 2 * max(self.height, self.width)

    def __call__(self, image: Tensor) -> Tensor:
        """Return uint8 of shape (..., height, width); a `tv_tensors.Mask` keeps its labels."""
        height, width = image.shape[-2:]
        if self.stretch:
            size = [self.height, self.width]
        elif height * self.width <= width * self.height:
            size = [self.height, max(self.width, int(self.height * width / height))]
        else:
            size = [max(self.height, int(self.width * height / width)), self.width]
        top = _crop_start(size[0], self.height, self.inner)
        left = _crop_start(size[1], self.width, self.inner)
        resized: Tensor = F.resize(image, size, antialias=True)
        fitted = resized[..., top : top + self.height, left : left + self.width]
        return fitted.as_subclass(Tensor)


def _crop_start(full: int, size: int, inner: int) -> int:
    # torchvision's CenterCrop starts at round((full - inner) / 2), and halves are rounded to even.
    return round((full - inner) / 2) - round((size - inner) / 2)


@dataclass(frozen=True)
class CachedSamples:
    """The samples of a stage in arrays that it may share with other stages.

    Attributes:
        arrays: Images and labels, or images and masks.
        rows: The row of each sample, int64 of shape (N,).
    """

    arrays: TensorDataset
    rows: Tensor


@dataclass(frozen=True)
class ImageCache:
    """Where and at which size images are cached.

    Attributes:
        kind: In the memory of this process, or in a file.
        fit: Gives all images the same size.
        folder: Folder of the cache files.
        num_threads: Threads that decode images.
    """

    kind: Literal["memory", "disk"]
    fit: FitImage
    folder: Path
    num_threads: int

    def load(self, images: CacheableImages, indices: Tensor) -> CachedSamples:
        """Load samples of a dataset; a file always has all of them.

        Raises:
            UserError: A sample cannot be read, or there is not enough memory.
            StorageError: The file cannot be written.
        """
        count = len(images) if self.kind == "disk" else len(indices)
        images = with_needed_side(images, self.fit.needed_side)
        parts = zip(("images", "masks"), self._read(images, 0), strict=False)
        shapes = {name: (count, *part.shape) for name, part in parts}
        if self.kind == "disk":
            arrays, rows = self._on_disk(images, shapes), indices
        else:
            arrays, rows = self._in_memory(images, indices, shapes), torch.arange(count)
        if "masks" not in shapes:
            labels = torch.as_tensor(images.targets)  # type: ignore[attr-defined]
            arrays.append(labels if self.kind == "disk" else labels[indices])
        pixels, targets = arrays
        return CachedSamples(TensorDataset(pixels.permute(0, 3, 1, 2), targets), rows)

    def _in_memory(self, images: CacheableImages, indices: Tensor, shapes: Shapes) -> list[Tensor]:
        try:
            arrays = [torch.empty(shape, dtype=torch.uint8) for shape in shapes.values()]
        except RuntimeError as error:
            raise UserError(
                f"data.cache='memory' needs {_num_bytes(shapes):,} bytes for {len(indices):,} "
                "images; use data.cache=disk, or a smaller data.cache_size"
            ) from error
        for row, parts in enumerate(self._decoded(images, indices.tolist(), shapes)):
            for array, part in zip(arrays, parts, strict=True):
                array[row] = part
        return arrays

    def _on_disk(self, images: CacheableImages, shapes: Shapes) -> list[Tensor]:
        path, header = self._path(images), self._header(images, shapes)
        if not _is_valid(path, header, shapes):
            with file_lock(path.with_suffix(".lock")):
                if not _is_valid(path, header, shapes):  # another process may have written it
                    if path.exists():
                        log.warning("%s is damaged, or its images have changed: renewed", path)
                    atomic_write(path, lambda file: self._write(file, path, header, images, shapes))
        return _map_file(path, len(header), shapes)

    def _path(self, images: CacheableImages) -> Path:
        key = f"{images.location} {self.fit}"
        digest = hashlib.sha256(os.fsencode(key)).hexdigest()[:16]
        return self.folder / f"images-{self.fit.height}x{self.fit.width}-{digest}.safetensors"

    def _header(self, images: CacheableImages, shapes: Shapes) -> bytes:
        """Return the header of a safetensors file with the only valid content.

        A file with another header is out of date or damaged; none is ever parsed.
        """
        info = {"version": VERSION, "fit": str(self.fit), "files": images.fingerprint()}
        tensors: dict[str, Any] = {"__metadata__": info}
        for (name, shape), start in zip(shapes.items(), _starts(shapes), strict=True):
            offsets = [start, start + prod(shape)]
            tensors[name] = {"dtype": "U8", "shape": shape, "data_offsets": offsets}
        text = json.dumps(tensors).encode()
        text += b" " * (-(len(text) + 8) % 64)
        return struct.pack("<Q", len(text)) + text

    def _write(
        self, file: BinaryIO, path: Path, header: bytes, images: CacheableImages, shapes: Shapes
    ) -> None:
        size = len(header) + _num_bytes(shapes)
        try:
            if hasattr(os, "posix_fallocate"):  # fail now if the disk is too small
                os.posix_fallocate(file.fileno(), 0, size)
            for row, parts in enumerate(self._decoded(images, range(len(images)), shapes)):
                for start, part in zip(_starts(shapes), parts, strict=True):
                    file.seek(len(header) + start + row * part.numel())
                    file.write(part.contiguous().numpy().data)
                maybe_crash("mid_write", path.name)
            file.seek(0)
            file.write(header)  # last, so that an incomplete file has none
            file.seek(size)
        except OSError as error:
            problem = storage_error(path, size, error)
            hint = "set data.cache_folder or a smaller data.cache_size"
            raise StorageError(f"{problem}; {hint}") from error

    def _decoded(
        self, images: CacheableImages, indices: Sequence[int], shapes: Shapes
    ) -> Iterator[list[Tensor]]:
        """Yield the parts of each sample in order, and show the progress."""
        expected = [shape[1:] for shape in shapes.values()]

        def read(index: int) -> list[Tensor]:
            parts = self._read(images, index)
            if [part.shape for part in parts] != expected:
                raise UserError(
                    f"data.cache: the image of sample {index} has {parts[0].shape[-1]} channels, "
                    f"that of sample 0 has {expected[0][-1]}"
                )
            return parts

        pool, starts = thread_pool(self.num_threads), range(0, len(indices), BLOCK)
        rows = (row for i in starts for row in pool.map(read, indices[i : i + BLOCK]))
        yield from show_progress(rows, len(indices), "decoding images", rank() == 0)

    def _read(self, images: CacheableImages, index: int) -> list[Tensor]:
        """Return an image as uint8 of shape (H, W, C), and its mask, if it has one, of (H, W)."""
        image, target = images[index]
        pixels = self.fit(image).permute(1, 2, 0)
        if not getattr(images, "has_masks", False):
            return [pixels]
        return [pixels, self.fit(tv_tensors.Mask(target))]


def _starts(shapes: Shapes) -> list[int]:
    """Return where each array starts, in bytes."""
    return list(accumulate(map(prod, shapes.values()), initial=0))[:-1]


def _num_bytes(shapes: Shapes) -> int:
    return sum(map(prod, shapes.values()))


def _is_valid(path: Path, header: bytes, shapes: Shapes) -> bool:
    if not path.is_file() or path.stat().st_size != len(header) + _num_bytes(shapes):
        return False
    with as_user_error(), path.open("rb") as file:
        return file.read(len(header)) == header


def _map_file(path: Path, offset: int, shapes: Shapes) -> list[Tensor]:
    with as_user_error():
        array = np.memmap(path, np.uint8, "r", offset)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        data = torch.from_numpy(array)
    parts = data.split([*map(prod, shapes.values())])
    return [part.view(shape) for part, shape in zip(parts, shapes.values(), strict=True)]


def load_cached(cache: ImageCache, datasets: dict[str, Dataset[Any]]) -> dict[str, CachedSamples]:
    """Load the samples of each stage; stages that are parts of one dataset share its array.

    Args:
        cache: How the images are kept.
        datasets: Datasets by stage, or subsets of them.

    Raises:
        UserError: A dataset has no images that can be cached, or one cannot be read.
        StorageError: The cache cannot be written.
    """
    check_cacheable(datasets)
    parts = {stage: base_dataset(dataset) for stage, dataset in datasets.items()}
    samples: dict[str, CachedSamples] = {}
    for images in {id(base): base for base, _ in parts.values()}.values():
        assert isinstance(images, CacheableImages)
        rows = {stage: rows for stage, (base, rows) in parts.items() if base is images}
        needed = torch.cat([*rows.values()]).unique()
        loaded = cache.load(images, needed)
        for stage, indices in rows.items():
            own = loaded.rows[torch.searchsorted(needed, indices)]
            samples[stage] = CachedSamples(loaded.arrays, own)
    return samples


def check_cacheable(datasets: dict[str, Dataset[Any]]) -> None:
    """Check that all datasets have images, and labels or masks, that can be cached.

    Raises:
        UserError: A dataset has none.
    """
    for stage, dataset in datasets.items():
        images = innermost(dataset)
        has_targets = getattr(images, "targets", None) is not None
        is_complete = has_targets or getattr(images, "has_masks", False)
        if not (isinstance(images, CacheableImages) and is_complete):
            raise UserError(
                f"data.cache: the {stage} data ({type(images).__name__}) are not image files "
                "with labels or masks; allowed: null"
            )
