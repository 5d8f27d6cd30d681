"""A folder of images without labels, to be predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from app.data.folder import decode
from app.runtime.errors import UserError, one_of


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
