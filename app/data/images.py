"""Folders of images, read and decoded sample by sample."""

from __future__ import annotations

import copy
import hashlib
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Literal, TypeVar

import torch
from PIL import EpsImagePlugin, Image, ImageFile, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

from app.config.schema import AUTO
from app.runtime.errors import UserError, as_user_error, join_choices

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # deprecated since torchvision 0.29
    decode_jpeg = None

T = TypeVar("T")
STAGE_FOLDERS = {"train": ("train",), "valid": ("valid", "val", "validation"), "test": ("test",)}
# Formats that Pillow decodes by itself; for EPS, it would start Ghostscript.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
DECODE_ERRORS = (OSError, SyntaxError, ValueError, MemoryError, Image.DecompressionBombError)


def image_folder(
    root: str, classes: list[str] | Literal["auto"] | None = AUTO, follow_links: bool = False
) -> ImageFolder | dict[str, ImageFolder | None]:
    """Return the images of one folder of class folders, or of such a folder for each stage.

    Folders for stages are named `train`, `valid` (or `val`, `validation`) and `test`.

    Args:
        root: The folder with the class folders, or with the folders for stages.
        classes: Names of the class folders in the order of their labels; `auto` or None takes
            those of the training images, in alphabetical order.
        follow_links: Whether to allow links that point outside the folder.

    Returns:
        A dataset, or one for each stage that has a folder. With a folder for `valid` but none for
        `test`, `test` is None: nothing shall be split off for it.

    Raises:
        UserError: The folder does not exist or has no class folders, a class has no images or is
            not one of the classes, or a link is not allowed.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise UserError(f"{root!r} is not a folder")
    check_links(folder, follow_links)
    stages = find_stage_folders(folder, _subfolders)
    known = list(classes) if isinstance(classes, list) else None
    if not stages:
        return _read_class_folders(folder, folder, known, _describe_single(folder))
    if known is None:
        known = _class_names(folder, stages.get("train", next(iter(stages.values()))))
    names = ", ".join(f"{path.name}/" for path in stages.values())
    layout = f"{folder} is read as {names} with {len(known)} classes: {join_choices(known)}"
    datasets: dict[str, ImageFolder | None] = {"test": None} if "valid" in stages else {}
    for stage, path in stages.items():
        datasets[stage] = _read_class_folders(folder, path, known, layout)
    return datasets


def _describe_single(folder: Path) -> str:
    return f"{folder} is read as one folder of classes, which data.split divides"


def find_stage_folders(root: Path, has_samples: Callable[[Path], object]) -> dict[str, Path]:
    """Return the folder of each stage.

    Args:
        root: The folder that may contain folders for stages.
        has_samples: Whether a folder has the layout of a stage; any other is left out.

    Raises:
        UserError: Two folders are for the same stage.
    """
    stages: dict[str, Path] = {}
    for stage, names in STAGE_FOLDERS.items():
        found = [root / name for name in names if has_samples(root / name)]
        if len(found) > 1:
            raise UserError(f"{found[0]} and {found[1]} both exist; allowed: one of them")
        if found:
            stages[stage] = found[0]
    return stages


def _subfolders(folder: Path) -> list[str]:
    """Return the names of the visible folders in a folder, in order."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    for name in names:
        if not name.isprintable():  # it would be the name of a class
            raise UserError(f"the folder {name!r} in {folder} needs a name that can be printed")
    return names


def _class_names(root: Path, folder: Path) -> list[str]:
    names = _subfolders(folder)
    are_stages = {*names} <= {name for folders in STAGE_FOLDERS.values() for name in folders}
    if len(names) > 1 and not are_stages:
        return names
    inner = [name for name in names if _subfolders(folder / name)]
    hint = f"; did you mean data.path={folder / inner[0]}?" if inner else ""
    found = f"the only class folder {names[0]!r}" if names else "no class folders"
    if names and are_stages:
        folder, found = folder / names[0], "no class folders"
    raise UserError(
        f"{folder} has {found}; expected are at least two folders of images, such as "
        f"{root}/cat/1.jpg and {root}/dog/7.jpg, or these in {root}/train, {root}/valid (or val) "
        f"and {root}/test{hint}"
    )


def _read_class_folders(
    root: Path, folder: Path, classes: list[str] | None, layout: str
) -> ImageFolder:
    is_training = classes is None or folder.name in STAGE_FOLDERS["train"]
    names = _class_names(root, folder) if classes is None else classes
    for name in _subfolders(folder):
        if name not in names:
            raise UserError(
                f"{folder / name}: {name!r} is not a class of the training data; allowed: "
                f"{join_choices(names)}"
            )
    paths, targets = [], []
    for label, name in enumerate(names):
        files = image_files(folder / name)
        if not files and is_training:
            raise UserError(
                f"{folder / name} contains no image; allowed: {join_choices(IMG_EXTENSIONS)}"
            )
        paths += [file.relative_to(root).as_posix() for file in files]
        targets += [label] * len(files)
    return ImageFolder(root, paths, targets, names, layout)


def image_files(folder: Path) -> list[Path]:
    """Return all visible images below a folder, in order of their folder and name."""
    return [
        Path(parent, name)
        for parent, _, names in sorted(os.walk(folder, followlinks=True))
        for name in sorted(names)
        if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")
    ]


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """Images in one folder per class; a sample is (uint8 of shape (3, H, W), label).

    Args:
        root: The folder that the paths begin in.
        paths: The file of each sample.
        targets: The label of each sample.
        classes: Names of the classes, in the order of their labels.
        layout: How the folder has been read, for the log.

    Attributes:
        needed_side: See `decode_image`.
    """

    needed_side: int | None = None

    def __init__(
        self, root: Path, paths: list[str], targets: list[int], classes: list[str], layout: str
    ) -> None:
        self.root, self.paths, self.targets = root, paths, targets
        self.classes, self.layout = classes, layout

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path = str(self.root / self.paths[index])
        return decode_image(path, needed_side=self.needed_side), self.targets[index]

    @property
    def location(self) -> str:
        """The folder that contains all files."""
        return str(self.root.resolve() / os.path.commonpath(self.paths))

    def fingerprint(self) -> str:
        """Return `fingerprint` of all files."""
        return fingerprint(self.root, self.paths)


def with_needed_side(dataset: T, side: int | None) -> T:
    """Return a dataset of image files, or a part of one, that decodes as many pixels as needed.

    Args:
        dataset: Any other dataset is returned as is.
        side: Length that suffices for the shorter side; None is that of the file.
    """
    if not isinstance(dataset, Subset | ImageFolder | ImageFiles):
        return dataset
    changed = copy.copy(dataset)
    if isinstance(changed, Subset):
        changed.dataset = with_needed_side(changed.dataset, side)
    else:
        changed.needed_side = side
    return changed


def fingerprint(root: Path, paths: Sequence[str]) -> str:
    """Return a hash of the paths, sizes and modification times of files below a folder."""
    digest = hashlib.sha256()
    for path in paths:
        with as_user_error():
            status = (root / path).stat()
        stamp = f"\0{status.st_size} {status.st_mtime_ns}\0"
        digest.update(os.fsencode(path) + stamp.encode())
    return digest.hexdigest()


def check_links(root: Path, follow_links: bool) -> None:
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


def decode_image(
    path: str, mode: Literal["RGB", "L"] = "RGB", needed_side: int | None = None
) -> Tensor:
    """Read an image file as uint8 of shape (3, H, W), or (1, H, W) in grayscale (`L`).

    Args:
        path: The file.
        mode: Its colors.
        needed_side: Length that suffices for the shorter side. A JPEG that has it also at a half, a
            quarter or an eighth of its size is decoded at that size, which saves time.

    Raises:
        UserError: The file cannot be read.
    """
    with open_image(path, path) as image:
        full_size = image.size
        if needed_side is not None:
            image.draft(image.mode, (needed_side, needed_side))
        is_plain_jpeg = (
            image.size == full_size and image.format == "JPEG" and image.mode in ("L", "RGB")
        )
        if is_plain_jpeg and mode == "RGB" and decode_jpeg is not None:
            assert isinstance(image, ImageFile.ImageFile)
            assert image.fp is not None
            # The same pixels as Pillow's, in three quarters of the time
            with suppress(RuntimeError):  # a damaged file: Pillow says what is wrong
                image.fp.seek(0)
                content = torch.frombuffer(bytearray(image.fp.read()), dtype=torch.uint8)
                decoded: Tensor = decode_jpeg(content, ImageReadMode.RGB)
                return decoded
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
        paths: Paths of the files relative to the folder.

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
        self.root, self.paths = root, [path.relative_to(root).as_posix() for path in files]
        self.mode: Literal["RGB", "L"] = "L" if channels == 1 else "RGB"
        self.resize = v2.Resize([side, side], antialias=True) if side else None
        self.needed_side = 2 * side if side else None  # see `decode_image`

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor]:
        path = str(self.root / self.paths[index])
        pixels = decode_image(path, self.mode, self.needed_side)
        return (self.resize(pixels) if self.resize else pixels,)


def _image_suffixes() -> list[str]:
    return [end for end, name in Image.registered_extensions().items() if name in IMAGE_FORMATS]
