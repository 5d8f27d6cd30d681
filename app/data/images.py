"""Folders of images, read and decoded sample by sample."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

from app.runtime.errors import UserError, one_of

UNREADABLE = (UnidentifiedImageError, OSError, SyntaxError, ValueError, MemoryError)


def image_folder(
    root: str, transforms: dict[str, Callable[[Tensor], Tensor]], follow_links: bool = False
) -> ImageFolder:
    """Images in a sub-folder for each class; a sample is (uint8 of shape (3, H, W), label).

    Args:
        root: The folder that holds the classes' folders; classes are numbered by name.
        transforms: Named, applied to each decoded image in turn; they must end in one size.
        follow_links: Also those that lead out of the folder.

    Raises:
        UserError: There is no such folder, a class without images, or a link that is not followed.
    """
    if not Path(root).is_dir():
        raise UserError(f"{root!r} is not a folder")
    _check_links(Path(root), follow_links)
    try:
        steps = v2.Compose(list(transforms.values())) if transforms else None
        return ImageFolder(root, transform=steps, loader=decode)
    except FileNotFoundError as error:
        raise UserError(str(error)) from error


def _check_links(root: Path, follow: bool) -> None:
    """Links to folders may also lead in circles, in which the search for images never ends."""
    home = root.resolve()
    for folder, folders, files in os.walk(root):
        for path in (Path(folder, name) for name in (*folders, *files)):
            if not path.is_symlink():
                continue
            target = path.resolve()
            if not follow and not target.is_relative_to(home):
                raise UserError(
                    f"{path} is a link out of the folder, to {target}; if it is yours, "
                    "add follow_links=true to the source"
                )
            if path.is_dir() and path.parent.resolve().is_relative_to(target):
                raise UserError(f"{path} is a link back to {target}, which holds it")


def decode(path: str, mode: Literal["RGB", "L"] = "RGB") -> Tensor:
    """An image file as uint8 of shape (3, height, width), or (1, height, width) in grey (`L`).

    Raises:
        UserError: It cannot be read.
    """
    try:
        with Image.open(path) as image:
            pixels: Tensor = pil_to_tensor(image.convert(mode))
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from error
    return pixels


class ImageFiles(Dataset[tuple[Tensor]]):
    """All images below a folder, by name; a sample is (uint8 of shape (C, height, width),).

    Args:
        folder: Looked through with all that lies in it.
        side: Pixels of a side to which they are resized; None leaves them.
        channels: 1 reads them in grey; else they have 3.

    Attributes:
        names: The paths of the files below the folder.

    Raises:
        UserError: There is no such folder, or no image in it.
    """

    def __init__(self, folder: str, side: int | None, channels: int | None) -> None:
        root, kinds = Path(folder), Image.registered_extensions()
        if not root.is_dir():
            raise UserError(f"predict.images={folder!r} is not a folder")
        files = sorted(path for path in root.rglob("*") if path.suffix.lower() in kinds)
        if not files:
            raise UserError(f"predict.images={folder!r} holds no image; kinds: {one_of(kinds)}")
        self.root, self.names = root, [path.relative_to(root).as_posix() for path in files]
        self.mode: Literal["RGB", "L"] = "L" if channels == 1 else "RGB"
        self.resize = v2.Resize([side, side], antialias=True) if side else None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor]:
        pixels = decode(str(self.root / self.names[index]), self.mode)
        return (self.resize(pixels) if self.resize else pixels,)
