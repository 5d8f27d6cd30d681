"""Folders of images and of masks, which have the class of each pixel."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageColor, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from app.data.batch import Inputs
from app.data.image_checks import NUM_THREADS, join_lines
from app.data.images import (
    DECODE_ERRORS,
    IMAGE_FORMATS,
    check_links,
    decode_image,
    find_stage_folders,
    fingerprint,
    image_files,
)
from app.data.split import innermost, printable
from app.runtime.errors import UserError, join_choices
from app.runtime.nested import Key, pick

Color = str | list[int]
Colors = dict[str, Color] | list[Color]
NUM_VALUES = 256  # of a byte: classes, and the label of ignored pixels
INDEX_MODES = ("1", "L", "P")  # of Pillow: images with one number per pixel
IGNORE = "ignore"  # name of the color of pixels that get `ignore_index`


def mask_folder(
    root: str,
    colors: Colors | None = None,
    num_classes: int | Literal["auto"] | None = None,
    ignore_index: int | None = None,
    follow_links: bool = False,
) -> MaskFolder | dict[str, MaskFolder | None]:
    """Return the images in `images` with the masks of the same names in `masks`.

    Both folders are in `root`, or in a folder for each stage in it: `train`, `valid` (or `val`,
    `validation`) and `test`.

    Args:
        root: The folder.
        colors: Color of each class, in the order of the classes, as '#rrggbb' or [r, g, b]; by
            name, or a list. The name `ignore` stands for pixels that get `ignore_index`. None:
            the pixels of masks are class indices.
        num_classes: Number of classes, which masks are checked for when they are read; None or
            `auto` does not check.
        ignore_index: Label of pixels without a class, from 0 to 255; None if there are none.
        follow_links: Whether to allow links that point outside the folder.

    Returns:
        A dataset, or one for each stage that has a folder. With a folder for `valid` but none for
        `test`, `test` is None: nothing shall be split off for it.

    Raises:
        UserError: The folder does not exist or has no images, an image has no mask or a mask no
            image, a color is not valid, or a link is not allowed.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise UserError(f"{root!r} is not a folder")
    if ignore_index is not None and not 0 <= ignore_index < NUM_VALUES:
        raise UserError(f"data.ignore_index={ignore_index} is not valid; allowed: 0 to 255, null")
    check_links(folder, follow_links)
    labels = MaskLabels(colors, None if num_classes == "auto" else num_classes, ignore_index)
    stages = _stage_folders(folder)
    if not stages:
        layout = f"{folder} is read as one folder of images and masks, which data.split divides"
        return _read_pairs(folder, folder, labels, layout)
    names = ", ".join(f"{path.name}/" for path in stages.values())
    layout = f"{folder} is read as {names}, each with images and masks"
    datasets: dict[str, MaskFolder | None] = {"test": None} if "valid" in stages else {}
    for stage, path in stages.items():
        datasets[stage] = _read_pairs(folder, path, labels, layout)
    return datasets


def _stage_folders(root: Path) -> dict[str, Path]:
    stages = find_stage_folders(root, _has_parts)
    if stages and "train" not in stages and _has_parts(root):
        raise UserError(
            f"{root} has images of its own and {join_choices(stages)}; use one or the other"
        )
    return stages


def _has_parts(folder: Path) -> bool:
    return any((folder / part).is_dir() for part in ("images", "masks"))


def _read_pairs(root: Path, folder: Path, labels: MaskLabels, layout: str) -> MaskFolder:
    for part in ("images", "masks"):
        if not (folder / part).is_dir():
            raise UserError(
                f"{folder} has no folder {part!r}; expected are {root}/images/1.jpg and "
                f"{root}/masks/1.png, or these in {root}/train, {root}/valid (or val) and "
                f"{root}/test"
            )
    images, masks = (_files_by_stem(folder / part) for part in ("images", "masks"))
    if not images:
        raise UserError(f"{folder / 'images'} contains no image")
    alone = [
        *(f"{printable(images[stem])} has no mask" for stem in images if stem not in masks),
        *(f"{printable(masks[stem])} has no image" for stem in masks if stem not in images),
    ]
    if alone:
        raise UserError(
            f"an image and its mask have the same name without the ending, but:{join_lines(alone)}"
        )
    paths, mask_paths = (
        [files[stem].relative_to(root).as_posix() for stem in images] for files in (images, masks)
    )
    return MaskFolder(root, paths, mask_paths, labels, layout)


def _files_by_stem(folder: Path) -> dict[str, Path]:
    """Return the images below a folder by their path in it, without the ending."""
    files: dict[str, Path] = {}
    for file in image_files(folder):
        stem = file.relative_to(folder).with_suffix("").as_posix()
        if stem in files:
            raise UserError(
                f"{printable(files[stem])} and {printable(file)} have the same name without the "
                "ending; allowed: one of them"
            )
        files[stem] = file
    return files


class MaskFolder(Dataset[tuple[Tensor, Tensor]]):
    """Images with masks; a sample is (uint8 of shape (3, H, W), uint8 of shape (H, W)).

    Args:
        root: The folder that the paths begin in.
        paths: The image of each sample.
        mask_paths: The mask of each sample.
        labels: Reads the masks.
        layout: How the folder has been read, for the log.

    Attributes:
        has_masks: Tells that targets must be transformed together with the inputs.
        classes: Names of the classes; None if they are not known.
    """

    has_masks = True

    def __init__(
        self, root: Path, paths: list[str], mask_paths: list[str], labels: MaskLabels, layout: str
    ) -> None:
        self.root, self.paths, self.mask_paths = root, paths, mask_paths
        self.labels, self.layout, self.classes = labels, layout, labels.names

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = decode_image(str(self.root / self.paths[index]))
        path = self.root / self.mask_paths[index]
        mask = self.labels.read(path)
        if mask.shape != image.shape[1:]:
            raise UserError(f"{printable(path)} {_sizes(mask.shape, image.shape[1:])}")
        return image, torch.from_numpy(mask)

    @property
    def location(self) -> str:
        """The folder that contains all files, and how colors become labels."""
        folder = os.path.commonpath(self.paths + self.mask_paths)
        return f"{self.root.resolve() / folder} {self.labels.table}"

    def fingerprint(self) -> str:
        """Return `fingerprint` of all images and masks."""
        return fingerprint(self.root, self.paths + self.mask_paths)

    @cached_property
    def pixel_counts(self) -> Tensor:
        """Number of pixels of each label in each mask, of shape (N, 256); 0 for `ignore_index`.

        All masks are read for it, and checked.

        Raises:
            UserError: Lists the masks that cannot be read, or are not as large as their image.
        """
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            results = list(pool.map(self._count_pixels, range(len(self))))
        problems = [result for result in results if isinstance(result, str)]
        if problems:
            raise UserError(
                f"{len(problems)} of {len(self)} masks are not valid:{join_lines(problems)}"
            )
        return torch.from_numpy(np.stack(results))

    def _count_pixels(self, index: int) -> np.ndarray | str:
        """Return the number of pixels of each label, or what is wrong with the mask."""
        path = self.root / self.mask_paths[index]
        try:
            mask = self.labels.read(path)
        except UserError as error:
            return str(error)
        size = _image_size(self.root / self.paths[index])
        if size is not None and mask.shape != size:
            return f"{printable(path)} {_sizes(mask.shape, size)}"
        return self.labels.count(mask)


def _image_size(path: Path) -> tuple[int, int] | None:
    """Return height and width of an image; None if it is damaged, which is reported elsewhere."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            return image.height, image.width
    except DECODE_ERRORS:
        return None


def _sizes(mask: Sequence[int], image: Sequence[int]) -> str:
    return f"has {mask[1]} x {mask[0]} pixels, but its image {image[1]} x {image[0]}"


class MaskLabels:
    """Reads masks as labels; see `mask_folder` for the arguments.

    Attributes:
        names: Names of the classes; None if colors have none.
        num_colors: Number of classes that have a color; None without colors.

    Raises:
        UserError: A color is not valid, or two are the same.
    """

    def __init__(
        self, colors: Colors | None, num_classes: int | None, ignore_index: int | None
    ) -> None:
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.names: list[str] | None = None
        self.num_colors: int | None = None
        self.table: tuple[np.ndarray, np.ndarray] | None = None  # sorted colors, and their labels
        if colors is None:
            return
        rgb = color_table(colors)
        if IGNORE in rgb and ignore_index is None:
            raise UserError("data.colors.ignore needs data.ignore_index, the label of its pixels")
        classes = [name for name in rgb if name != IGNORE]
        self.names = classes if isinstance(colors, dict) else None
        self.num_colors = len(classes)
        labels = [ignore_index if name == IGNORE else classes.index(name) for name in rgb]
        codes = _pack(np.array([*rgb.values()]))
        order = codes.argsort()
        self.table = codes[order], np.array(labels, np.uint8)[order]

    def read(self, path: Path) -> np.ndarray:
        """Return the labels in a mask, uint8 of shape (H, W).

        Raises:
            UserError: The file cannot be read, has another kind of pixels, or a label that is not
                a class.
        """
        name = printable(path)
        try:
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                mask = self._read(name, image)
        except UnidentifiedImageError as error:
            raise UserError(f"{name} is not an image; allowed: PNG") from error
        except DECODE_ERRORS as error:
            raise UserError(f"{name} cannot be read as a mask: {error}") from error
        labels = self.count(mask).nonzero()[0]
        if self.num_classes is not None and labels.size and labels[-1] >= self.num_classes:
            raise UserError(self.describe_invalid(name, labels[-1], self.num_classes))
        return mask

    def _read(self, name: str, image: Image.Image) -> np.ndarray:
        if image.format == "JPEG":
            raise UserError(f"{name} is a JPEG, which changes labels; allowed: PNG")
        if self.table is not None:
            return _from_colors(name, np.asarray(image.convert("RGB")), *self.table)
        if image.mode not in INDEX_MODES:
            raise UserError(
                f"{name} has pixels of mode {image.mode}; allowed: a byte with the class (modes L, "
                "P), or colors that are in data.colors"
            )
        return np.array(image, np.uint8)

    def count(self, mask: np.ndarray) -> np.ndarray:
        """Return the number of pixels of each label, of shape (256,); 0 for `ignore_index`."""
        counts = np.bincount(mask.ravel(), minlength=NUM_VALUES)
        if self.ignore_index is not None:
            counts[self.ignore_index] = 0
        return counts

    def describe_invalid(self, name: str, label: int, num_classes: int) -> str:
        """Return the error that a mask has a label that is not a class."""
        ignored = "..." if self.ignore_index is None else self.ignore_index
        return (
            f"{name} has the label {label}; allowed: 0 to {num_classes - 1}, and "
            f"data.ignore_index={ignored} for pixels without a class"
        )


def _from_colors(
    name: str, pixels: np.ndarray, known_codes: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    codes = _pack(pixels)
    index = np.searchsorted(known_codes, codes).clip(max=len(known_codes) - 1)
    is_unknown = known_codes[index] != codes
    if is_unknown.any():
        y, x = np.argwhere(is_unknown)[0]
        allowed = ", ".join(f"#{code:06x}" for code in known_codes[:20])
        raise UserError(
            f"{name} has the color #{codes[y, x]:06x} at x={x}, y={y}, which is not in "
            f"data.colors; allowed: {allowed}"
        )
    found: np.ndarray = labels[index]
    return found


def color_table(colors: Colors) -> dict[str, tuple[int, int, int]]:
    """Return the colors as (red, green, blue), by name or number.

    Raises:
        UserError: A color is not valid, or two are the same.
    """
    named = colors if isinstance(colors, dict) else dict(enumerate(colors))
    table: dict[str, tuple[int, int, int]] = {}
    for name, color in named.items():
        rgb = _parse_color(str(name), color)
        same = next((other for other in table if table[other] == rgb), None)
        if same is not None:
            raise UserError(f"data.colors: {same!r} and {str(name)!r} have the same color {color}")
        table[str(name)] = rgb
    return table


def _parse_color(name: str, color: Color) -> tuple[int, int, int]:
    try:
        values = ImageColor.getrgb(color) if isinstance(color, str) else tuple(color)
    except ValueError:
        values = ()
    if len(values) != 3 or not all(0 <= value < NUM_VALUES for value in values):
        raise UserError(
            f"data.colors.{name}={color!r} is not a color; allowed: '#rrggbb', or [r, g, b] from "
            "0 to 255"
        )
    return values[0], values[1], values[2]


def _pack(pixels: np.ndarray) -> np.ndarray:
    """Return colors (..., 3) as one number each."""
    values = pixels.astype(np.int32)
    packed: np.ndarray = (values[..., 0] << 16) | (values[..., 1] << 8) | values[..., 2]
    return packed


def has_masks(dataset: Dataset[Any], inputs: Inputs, targets: Key) -> bool:
    """Return whether the targets are masks: label maps as large as the images.

    A dataset says so by its attribute `has_masks`; of one in memory it follows from the shapes.

    Args:
        dataset: The dataset.
        inputs: Key of the images within a sample.
        targets: Key of the targets within a sample.
    """
    if not isinstance(inputs, (int, str)) or not isinstance(targets, (int, str)):
        return False
    if not isinstance(dataset, TensorDataset):
        return bool(getattr(innermost(dataset), "has_masks", False))
    count = len(dataset.tensors)
    if not all(isinstance(key, int) and key < count for key in (inputs, targets)):
        return False
    images, masks = pick(dataset.tensors, inputs), pick(dataset.tensors, targets)
    is_integer = not masks.is_floating_point() and masks.dtype != torch.bool
    is_map = images.ndim == 4 and masks.shape == (len(images), *images.shape[2:])
    return is_integer and is_map


def pixel_counts(dataset: Dataset[Any]) -> Tensor | None:
    """Return `MaskFolder.pixel_counts` of the samples; None if the dataset has no mask files.

    Raises:
        UserError: A mask is not valid.
    """
    if isinstance(dataset, Subset):
        counts = pixel_counts(dataset.dataset)
        return None if counts is None else counts[torch.as_tensor(dataset.indices)]
    return dataset.pixel_counts if isinstance(dataset, MaskFolder) else None


def count_mask_classes(dataset: Dataset[Any]) -> int | None:
    """Return the number of colors, or of labels in masks; None if the dataset has no mask files.

    Raises:
        UserError: There are fewer than two labels, or one in between is missing.
    """
    if not isinstance(dataset, MaskFolder):
        return None
    if dataset.labels.num_colors is not None:
        return dataset.labels.num_colors
    labels = dataset.pixel_counts.sum(0).nonzero().flatten().tolist()
    if len(labels) > 1 and labels == list(range(len(labels))):
        return len(labels)
    shown = ", ".join(map(str, labels[:20])) or "none"
    raise UserError(
        f"data.num_classes='auto': the labels in the training masks are {shown}, apart from "
        f"data.ignore_index={dataset.labels.ignore_index}; allowed are 0, 1, ... without a gap. "
        "Set data.num_classes; or, if the masks are colored, or black and white, data.colors, such "
        "as data.colors={background:'#000000',object:'#ffffff'}"
    )


def check_mask_labels(datasets: Mapping[str, Dataset[Any]], num_classes: object) -> list[str]:
    """Check the labels of all masks; return a warning for each class that the training masks lack.

    Args:
        datasets: Datasets by stage; those without mask files are skipped.
        num_classes: Number of classes.

    Raises:
        UserError: A mask is not valid, or has a label that is not a class.
    """
    warnings: list[str] = []
    for stage, dataset in datasets.items():
        if not isinstance(dataset, MaskFolder) or not isinstance(num_classes, int):
            continue
        num_colors = dataset.labels.num_colors
        if num_colors not in (None, num_classes):
            raise UserError(
                f"data.num_classes={num_classes}, but data.colors has {num_colors} classes"
            )
        counts = dataset.pixel_counts
        if counts[:, num_classes:].any():
            index, label = counts[:, num_classes:].nonzero()[0].tolist()
            name = printable(dataset.root / dataset.mask_paths[index])
            raise UserError(dataset.labels.describe_invalid(name, num_classes + label, num_classes))
        if stage == "train":
            names = dataset.classes or range(num_classes)
            missing = (counts[:, :num_classes].sum(0) == 0).nonzero().flatten().tolist()
            warnings += [f"no pixel of class {names[k]} in the training masks" for k in missing]
    return warnings
