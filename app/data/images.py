"""Folders of images, read and decoded sample by sample."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

from app.runtime.errors import UserError, join_choices

DECODE_ERRORS = (UnidentifiedImageError, OSError, SyntaxError, ValueError, MemoryError)


def image_folder(root: str, follow_links: bool = False) -> ImageFolder:
    """Return a dataset of images in one sub-folder per class.

    A sample is (uint8 of shape (3, H, W), label).

    Args:
        root: The folder that contains the class folders; classes are numbered in order of name.
        follow_links: Whether to allow links that point outside the folder.

    Raises:
        UserError: The folder does not exist, a class has no images, or a link is not allowed.
    """
    if not Path(root).is_dir():
        raise UserError(f"{root!r} is not a folder")
    _check_links(Path(root), follow_links)
    try:
        return ImageFolder(root, loader=decode_image)
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
    try:
        with Image.open(path) as image:
            pixels: Tensor = pil_to_tensor(image.convert(mode))
    except (*DECODE_ERRORS, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from error
    return pixels


class ImageFiles(Dataset[tuple[Tensor]]):
    """All images below a folder, in order of name; a sample is (uint8 of shape (C, H, W),).

    Args:
        folder: Searched recursively.
        side: Height and width in pixels to resize to; None keeps the size.
        channels: 1 reads images in grayscale; any other value gives 3 channels.

    Attributes:
        paths: Paths of the files relative to the folder.

    Raises:
        UserError: The folder does not exist or contains no image.
    """

    def __init__(self, folder: str, side: int | None, channels: int | None) -> None:
        root, suffixes = Path(folder), Image.registered_extensions()
        if not root.is_dir():
            raise UserError(f"predict.images={folder!r} is not a folder")
        files = sorted(path for path in root.rglob("*") if path.suffix.lower() in suffixes)
        if not files:
            raise UserError(
                f"predict.images={folder!r} contains no image; allowed: {join_choices(suffixes)}"
            )
        self.root, self.paths = root, [path.relative_to(root).as_posix() for path in files]
        self.mode: Literal["RGB", "L"] = "L" if channels == 1 else "RGB"
        self.resize = v2.Resize([side, side], antialias=True) if side else None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor]:
        pixels = decode_image(str(self.root / self.paths[index]), self.mode)
        return (self.resize(pixels) if self.resize else pixels,)
