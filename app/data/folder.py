"""Folders of images, read and decoded sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

from app.config.errors import UserError


def image_folder(root: str, transforms: dict[str, Callable[[Tensor], Tensor]]) -> ImageFolder:
    """Images in a sub-folder for each class; a sample is (uint8 of shape (3, H, W), label).

    Args:
        root: The folder that holds the classes' folders; classes are numbered by name.
        transforms: Named, applied to each decoded image in turn; they must end in one size.

    Raises:
        UserError: There is no such folder, or a class without images.
    """
    if not Path(root).is_dir():
        raise UserError(f"{root!r} is not a folder")
    try:
        steps = v2.Compose(list(transforms.values())) if transforms else None
        return ImageFolder(root, transform=steps, loader=decode)
    except FileNotFoundError as error:
        raise UserError(str(error)) from error


def decode(path: str, mode: Literal["RGB", "L"] = "RGB") -> Tensor:
    """An image file as uint8 of shape (3, height, width), or (1, height, width) in grey (`L`).

    Raises:
        UserError: It cannot be read.
    """
    try:
        with Image.open(path) as image:
            pixels: Tensor = pil_to_tensor(image.convert(mode))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from error
    return pixels
