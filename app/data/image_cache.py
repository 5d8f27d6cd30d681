"""Images decoded once into one array: in memory, or in a file that ranks, runs and sweeps share."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms.v2 import functional as F

from app.data.progress import show_progress
from app.data.split import base_dataset, innermost
from app.distributed.collectives import rank
from app.runtime.errors import UserError, as_user_error
from app.runtime.files import atomic_write, storage_error
from app.runtime.lock import file_lock

log = logging.getLogger(__name__)
VERSION = "1"  # of the pixels in a cache file; to be raised when they change
BLOCK = 1024  # images that are decoded before all of them have been stored


@runtime_checkable
class CacheableImages(Protocol):
    """A dataset of (image, label) samples whose images can be kept in one array.

    Attributes:
        targets: The label of each sample.
        location: Where the images come from, such as their folder.
    """

    targets: list[int]
    location: str

    def __len__(self) -> int: ...

    def read_image(self, index: int) -> Tensor:
        """Return an image, uint8 of shape (C, H, W)."""

    def fingerprint(self) -> str:
        """Return a text that changes when an image is changed, added or removed."""


@dataclass(frozen=True)
class FitImage:
    """Resizes an image until it covers a size, and cuts out the middle.

    An image whose shorter side has been resized to 256 pixels, as for evaluation, is not resized
    again by `FitImage(256, 256, ...)`.

    Attributes:
        height: Height of the result.
        width: Width of the result.
        inner: Size of the centre crops that shall contain the same pixels when they are taken from
            the result instead of the entire image. This decides how half pixels are rounded; sizes
            that differ by a multiple of 4 are equivalent.
    """

    height: int
    width: int
    inner: int = 0

    def __call__(self, image: Tensor) -> Tensor:
        """Return uint8 of shape (C, height, width)."""
        height, width = image.shape[-2:]
        if height * self.width <= width * self.height:
            size = [self.height, max(self.width, int(self.height * width / height))]
        else:
            size = [max(self.height, int(self.width * height / width)), self.width]
        top = _crop_start(size[0], self.height, self.inner)
        left = _crop_start(size[1], self.width, self.inner)
        resized: Tensor = F.resize(image, size, antialias=True)
        return resized[:, top : top + self.height, left : left + self.width]


def _crop_start(full: int, size: int, inner: int) -> int:
    # torchvision's CenterCrop starts at round((full - inner) / 2), and halves are rounded to even.
    return round((full - inner) / 2) - round((size - inner) / 2)


@dataclass(frozen=True)
class CachedSamples:
    """The samples of a stage in arrays that it may share with other stages.

    Attributes:
        arrays: Images and labels.
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
            UserError: An image cannot be read, or there is not enough memory.
            StorageError: The file cannot be written.
        """
        labels = torch.tensor(images.targets)
        form = (self.fit.height, self.fit.width, len(images.read_image(0)))
        if self.kind == "disk":
            array, rows = self._on_disk(images, (len(images), *form)), indices
        else:
            array, rows = (
                self._read(images, indices, (len(indices), *form)),
                torch.arange(len(indices)),
            )
            labels = labels[indices]
        return CachedSamples(TensorDataset(array.permute(0, 3, 1, 2), labels), rows)

    def _read(self, images: CacheableImages, indices: Tensor, shape: tuple[int, ...]) -> Tensor:
        try:
            array = torch.empty(shape, dtype=torch.uint8)
        except RuntimeError as error:
            raise UserError(
                f"data.cache='memory' needs {np.prod(shape):,} bytes for {shape[0]:,} images; "
                "use data.cache=disk, or a smaller data.cache_size"
            ) from error
        for index, pixels in enumerate(self._decoded(images, indices.tolist())):
            array[index] = pixels
        return array

    def _on_disk(self, images: CacheableImages, shape: tuple[int, ...]) -> Tensor:
        path, header = self._path(images), self._header(images, shape)
        if not _is_valid(path, header, shape):
            with file_lock(path.with_suffix(".lock")):
                if not _is_valid(path, header, shape):  # another process may have written it
                    if path.exists():
                        log.warning("%s is damaged, or its images have changed: renewed", path)
                    atomic_write(path, lambda file: self._write(file, path, header, images, shape))
        return _map_file(path, len(header), shape)

    def _path(self, images: CacheableImages) -> Path:
        key = f"{images.location} {self.fit}"
        digest = hashlib.sha256(os.fsencode(key)).hexdigest()[:16]
        return self.folder / f"images-{self.fit.height}x{self.fit.width}-{digest}.safetensors"

    def _header(self, images: CacheableImages, shape: tuple[int, ...]) -> bytes:
        """Return the header of a safetensors file with the only valid content.

        A file with another header is out of date or damaged; none is ever parsed.
        """
        info = {"version": VERSION, "fit": str(self.fit), "files": images.fingerprint()}
        size = int(np.prod(shape))
        tensor = {"dtype": "U8", "shape": shape, "data_offsets": [0, size]}
        text = json.dumps({"__metadata__": info, "images": tensor}).encode()
        text += b" " * (-(len(text) + 8) % 64)
        return struct.pack("<Q", len(text)) + text

    def _write(
        self,
        file: BinaryIO,
        path: Path,
        header: bytes,
        images: CacheableImages,
        shape: tuple[int, ...],
    ) -> None:
        size = len(header) + int(np.prod(shape))
        try:
            if hasattr(os, "posix_fallocate"):  # fail now if the disk is too small
                os.posix_fallocate(file.fileno(), 0, size)
            file.write(header)
            for pixels in self._decoded(images, range(len(images))):
                file.write(pixels.contiguous().numpy().data)
        except OSError as error:
            raise storage_error(path, size, error) from error

    def _decoded(self, images: CacheableImages, indices: Sequence[int]) -> Iterator[Tensor]:
        """Yield images in order, uint8 of shape (H, W, C), and show the progress."""

        def read(index: int) -> Tensor:
            return self.fit(images.read_image(index)).permute(1, 2, 0)

        pool = ThreadPoolExecutor(self.num_threads)
        try:
            starts = range(0, len(indices), BLOCK)
            rows = (row for i in starts for row in pool.map(read, indices[i : i + BLOCK]))
            yield from show_progress(rows, len(indices), "decoding images", rank() == 0)
        finally:
            pool.shutdown(cancel_futures=True)


def _is_valid(path: Path, header: bytes, shape: tuple[int, ...]) -> bool:
    if not path.is_file() or path.stat().st_size != len(header) + np.prod(shape):
        return False
    with as_user_error(), path.open("rb") as file:
        return file.read(len(header)) == header


def _map_file(path: Path, offset: int, shape: tuple[int, ...]) -> Tensor:
    with as_user_error():
        array = np.memmap(path, np.uint8, "r", offset, shape)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


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
    """Check that all datasets have images and labels that can be cached.

    Raises:
        UserError: A dataset has none.
    """
    for stage, dataset in datasets.items():
        images = innermost(dataset)
        if not isinstance(images, CacheableImages) or images.targets is None:
            raise UserError(
                f"data.cache: the {stage} data ({type(images).__name__}) are not image files "
                "with labels; allowed: null"
            )
