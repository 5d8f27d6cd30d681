"""Folders of images, read and decoded sample by sample."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Literal

from PIL import EpsImagePlugin, Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

from app.runtime.errors import UserError, join_choices

# Formats that Pillow decodes by itself; for EPS, it would start Ghostscript.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
DECODE_ERRORS = (OSError, SyntaxError, ValueError, MemoryError, Image.DecompressionBombError)


def image_folder(
    root: str, transforms: dict[str, Callable[[Tensor], Tensor]], follow_links: bool = False
) -> ImageFolder:
    """Return a dataset of images in one sub-folder per class.

    A sample is (uint8 of shape (3, H, W), label).

    Args:
        root: The folder that contains the class folders; classes are numbered in order of name.
        transforms: Named transforms, applied to each decoded image in order; together they must
            give all images the same size.
        follow_links: Whether to allow links that point outside the folder.

    Raises:
        UserError: The folder does not exist, a class has no images, or a link is not allowed.
    """
    if not Path(root).is_dir():
        raise UserError(f"{root!r} is not a folder")
    _check_links(Path(root), follow_links)
    try:
        transform = v2.Compose(list(transforms.values())) if transforms else None
        return ImageFolder(root, transform=transform, loader=decode_image)
    except FileNotFoundError as error:
        raise UserError(str(error)) from error


def _check_links(root: Path, follow_links: bool) -> None:
    """Refuse links that point outside, and cycles of links, which would be searched forever."""
    resolved_root = root.resolve()
    for folder, folders, files in os.walk(root):
        for path in (Path(folder, name) for name in (*folders, *files)):
            if not path.is_symlink():
                continue
            target = path.resolve()
            if not follow_links and not target.is_relative_to(resolved_root):
                raise UserError(
                    f"{path} is a link to {target}, outside the folder; if you trust it, "
                    "add follow_links=true to the source"
                )
            if path.is_dir() and path.parent.resolve().is_relative_to(target):
                raise UserError(f"{path} is a link back to {target}, which contains it")


def decode_image(path: str, mode: Literal["RGB", "L"] = "RGB") -> Tensor:
    """Read an image file as uint8 of shape (3, H, W), or (1, H, W) in grayscale (`L`).

    Raises:
        UserError: The file cannot be read.
    """
    with open_image(path, path) as image:
        pixels: Tensor = pil_to_tensor(image.convert(mode))
    return pixels


@contextmanager
def open_image(file: str | BytesIO, name: str) -> Iterator[Image.Image]:
    """Open an image in one of the `IMAGE_FORMATS`, whatever its name ends in.

    Args:
        file: Path or content of the image.
        name: Name of the image in errors.

    Raises:
        UserError: The image has another format, or cannot be decoded inside the `with` block.
    """
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            yield image
    except UnidentifiedImageError as error:
        found, allowed = _describe_format(file), join_choices(IMAGE_FORMATS)
        raise UserError(
            f"{name} cannot be read as an image: {found}; allowed: {allowed}"
        ) from error
    except DECODE_ERRORS as error:
        raise UserError(f"{name} cannot be read as an image: {error}") from error


def _describe_format(file: str | BytesIO) -> str:
    """Name the format by the first bytes, without opening the image."""
    prefix = file.getvalue()[:16] if isinstance(file, BytesIO) else _first_bytes(file)
    Image.init()
    for name, (_, accepts) in Image.OPEN.items():
        with suppress(struct.error, IndexError):  # of a prefix that is too short
            if accepts is not None and accepts(prefix) is True:
                return f"its format is {name}"
    return "its format is unknown"


def _first_bytes(path: str) -> bytes:
    with Path(path).open("rb") as file:
        return file.read(16)


@contextmanager
def without_ghostscript() -> Iterator[None]:
    """Keep Pillow from starting Ghostscript, also for other libraries that read images.

    `torchvision.datasets`, for example, opens whatever Pillow recognizes.
    """
    before = EpsImagePlugin.gs_binary
    EpsImagePlugin.gs_binary = False
    try:
        yield
    finally:
        EpsImagePlugin.gs_binary = before


class ImageFiles(Dataset[tuple[Tensor]]):
    """All images below a folder, in order of name; a sample is (uint8 of shape (C, H, W),).

    Args:
        folder: Searched recursively.
        side: Height and width in pixels to resize to; None keeps the size.
        channels: 1 reads images in grayscale; any other value gives 3 channels.

    Attributes:
        names: Paths of the files relative to the folder.

    Raises:
        UserError: The folder does not exist or contains no image.
    """

    def __init__(self, folder: str, side: int | None, channels: int | None) -> None:
        root, suffixes = Path(folder), _image_suffixes()
        if not root.is_dir():
            raise UserError(f"predict.images={folder!r} is not a folder")
        files = sorted(path for path in root.rglob("*") if path.suffix.lower() in suffixes)
        if not files:
            raise UserError(
                f"predict.images={folder!r} contains no image; allowed: {join_choices(suffixes)}"
            )
        self.root, self.names = root, [path.relative_to(root).as_posix() for path in files]
        self.mode: Literal["RGB", "L"] = "L" if channels == 1 else "RGB"
        self.resize = v2.Resize([side, side], antialias=True) if side else None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor]:
        pixels = decode_image(str(self.root / self.names[index]), self.mode)
        return (self.resize(pixels) if self.resize else pixels,)


def _image_suffixes() -> list[str]:
    return [end for end, name in Image.registered_extensions().items() if name in IMAGE_FORMATS]
