"""Folders of images with boxes in a file of COCO's format."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeGuard, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from app.data.boxes import Targets, make_targets
from app.data.image_checks import NUM_THREADS, join_lines
from app.data.images import (
    DECODE_ERRORS,
    IMAGE_FORMATS,
    check_links,
    decode_image,
    find_stage_folders,
    fingerprint,
)
from app.data.split import printable
from app.runtime.errors import UserError, join_choices
from app.runtime.small_files import parse_json, read_small_file

T = TypeVar("T")
MAX_BYTES = 2**29  # of a file of annotations; that of COCO's training data has 448 MiB
MAX_VALUES = 100_000_000
LISTS = ("images", "categories", "annotations")  # of a file
TOLERANCE = 1.0  # pixels by which rounded boxes may leave their image; they are cut off


def coco_folder(root: str, follow_links: bool = False) -> CocoFolder | dict[str, CocoFolder | None]:
    """Return the images of a folder with the boxes in the JSON file next to them.

    The file has any name; its `file_name`s are looked up in its folder, and in `images` there. It
    is in `root`, or one for each stage in `train`, `valid` (or `val`, `validation`) and `test`.

    Args:
        root: The folder.
        follow_links: Whether to allow links that point outside the folder.

    Returns:
        A dataset, or one for each stage that has a folder. With a folder for `valid` but none for
        `test`, `test` is None: nothing shall be split off for it.

    Raises:
        UserError: The folder or its files do not exist, a file is not of COCO's format, or a link
            is not allowed.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise UserError(f"{root!r} is not a folder")
    check_links(folder, follow_links)
    stages = find_stage_folders(folder, _json_files)
    if not stages:
        return _read_part(folder, folder, "is read as one part, which data.split divides")
    if _json_files(folder):
        raise UserError(
            f"{folder} has a JSON file of its own and {join_choices(stages)}; use one or the other"
        )
    datasets: dict[str, CocoFolder | None] = {"test": None} if "valid" in stages else {}
    for stage, path in stages.items():
        datasets[stage] = _read_part(folder, path, f"is read as {stage} data")
    return datasets


def _json_files(folder: Path) -> list[str]:
    names = [path.name for path in folder.glob("*.json")] if folder.is_dir() else []
    return sorted(name for name in names if not name.startswith("."))


def _read_part(root: Path, folder: Path, layout: str) -> CocoFolder:
    names = _json_files(folder)
    if len(names) != 1:
        found = join_choices(names) if names else "none"
        raise UserError(
            f"{folder} must have one JSON file, with the boxes of its images; it has {found}. "
            f"Expected are {root}/boxes.json and {root}/images/1.jpg, or these in {root}/train, "
            f"{root}/valid (or val) and {root}/test"
        )
    path = folder / names[0]
    text = read_small_file(folder, names[0], MAX_BYTES) or ""
    content = parse_json(text, printable(path), MAX_VALUES)
    annotations = _Parser(path).parse(content)
    count = sum(map(len, annotations.labels))
    layout = f"{printable(path)} {layout}: {len(annotations.paths)} images with {count} boxes"
    return CocoFolder(root, path, annotations, layout)


@dataclass(frozen=True)
class Annotations:
    """The content of a file, by image.

    Attributes:
        classes: Names of the categories, in the order of their ids.
        paths: File of each image.
        sizes: Height and width of each image.
        boxes: Boxes (K, 4) of each image, as (x1, y1, x2, y2) in pixels.
        labels: Labels (K,) of each image: positions in `classes`.
        crowd: Whether each box of an image has several objects, bool of shape (K,).
    """

    classes: list[str]
    paths: list[Path]
    sizes: list[tuple[int, int]]
    boxes: list[Tensor]
    labels: list[Tensor]
    crowd: list[Tensor]


class CocoFolder(Dataset[tuple[Tensor, Targets]]):
    """Images with boxes; a sample is (uint8 of shape (3, H, W), targets of `app.data.boxes`).

    Args:
        root: The folder that paths of samples begin in.
        file: The file of annotations.
        annotations: Its content.
        layout: How the folder has been read, for the log.
    """

    has_boxes = True

    def __init__(self, root: Path, file: Path, annotations: Annotations, layout: str) -> None:
        self.root, self.annotations, self.layout = root, annotations, layout
        self.paths = [path.relative_to(root).as_posix() for path in annotations.paths]
        self.annotation_paths = [file.relative_to(root).as_posix()]
        self.classes = annotations.classes
        self.max_boxes = max(map(len, annotations.labels))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Targets]:
        image, known = decode_image(str(self.root / self.paths[index])), self.annotations
        if (image.shape[1], image.shape[2]) != known.sizes[index]:
            raise UserError(self._describe_size(index, (image.shape[1], image.shape[2])))
        boxes = known.boxes[index], known.labels[index], known.crowd[index]
        return image, make_targets(*boxes, self.max_boxes, known.sizes[index])

    @property
    def location(self) -> str:
        """The file of annotations."""
        return str(self.root.resolve() / self.annotation_paths[0])

    def fingerprint(self) -> str:
        """Return `fingerprint` of all images and of the annotations."""
        return fingerprint(self.root, self.paths + self.annotation_paths)

    def check_sizes(self) -> None:
        """Check that all images are as large as the annotations say.

        Raises:
            UserError: Lists the images that are not.
        """
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            sizes = list(pool.map(self._size_of_file, range(len(self))))
        known = self.annotations.sizes
        bad = [i for i, size in enumerate(sizes) if size is not None and size != known[i]]
        if bad:
            lines = [self._describe_size(index, sizes[index] or (0, 0)) for index in bad]
            raise UserError(
                f"{len(bad)} of {len(self)} images have another size than in "
                f"{self.annotation_paths[0]}; perhaps they were turned by their EXIF "
                f"orientation, which is not applied here:{join_lines(lines)}"
            )

    def _size_of_file(self, index: int) -> tuple[int, int] | None:
        """Return height and width; None of a damaged image, which is reported elsewhere."""
        try:
            with Image.open(self.root / self.paths[index], formats=IMAGE_FORMATS) as image:
                return image.height, image.width
        except DECODE_ERRORS:
            return None

    def _describe_size(self, index: int, found: tuple[int, int]) -> str:
        height, width = self.annotations.sizes[index]
        return (
            f"{printable(self.root / self.paths[index])} has {found[1]} x {found[0]} pixels, but "
            f"{width} x {height} in the annotations"
        )


def check_boxes(datasets: Mapping[str, Dataset[Any]]) -> list[str]:
    """Check the sizes of images; return a warning for each class without a training box.

    Args:
        datasets: Datasets by stage; those of other kinds are skipped.

    Raises:
        UserError: An image has another size than in the annotations.
    """
    warnings: list[str] = []
    for stage, dataset in datasets.items():
        if not isinstance(dataset, CocoFolder):
            continue
        dataset.check_sizes()
        if stage == "train":
            present = {*torch.cat(dataset.annotations.labels).tolist()}
            missing = [name for k, name in enumerate(dataset.classes) if k not in present]
            warnings += [f"no box of class {name} in the training data" for name in missing]
    return warnings


class _Box(NamedTuple):
    """An annotation, as (x1, y1, x2, y2) in pixels."""

    corners: list[float]
    label: int
    is_crowd: bool


class _Parser:
    """Checks the content of a file, and collects what is wrong with it.

    Args:
        file: The file.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.problems: list[str] = []

    def parse(self, content: object) -> Annotations:
        """Return the annotations.

        Raises:
            UserError: Lists what is not valid.
        """
        entries = {name: self._entries(content, name) for name in LISTS}
        self._raise_problems()
        images = self._by_id("image", entries["images"], self._image)
        names = self._by_id("category", entries["categories"], _category_name)
        labels = {key: label for label, key in enumerate(sorted(names))}
        classes = [names[key] for key in labels]
        for name in sorted({name for name in classes if classes.count(name) > 1}):
            self.problems.append(f"several categories have the name {name!r}")
        self._raise_problems()
        by_image: dict[int, list[_Box]] = {key: [] for key in images}
        sizes = {key: size for key, (_, size) in images.items()}
        for image, box in self._boxes(entries["annotations"], sizes, labels):
            by_image[image].append(box)
        self._raise_problems()
        boxes = by_image.values()
        return Annotations(
            classes,
            [path for path, _ in images.values()],
            [*sizes.values()],
            [_tensor([b.corners for b in found], torch.float32).reshape(-1, 4) for found in boxes],
            [_tensor([b.label for b in found], torch.int64) for found in boxes],
            [_tensor([b.is_crowd for b in found], torch.bool) for found in boxes],
        )

    def _entries(self, content: object, name: str) -> list[Any]:
        found = content.get(name) if isinstance(content, dict) else None
        if isinstance(found, list) and found:
            return found
        problem = "is empty" if found == [] else "is missing"
        self.problems.append(f"{name!r} {problem}; expected is a list of objects")
        return []

    def _boxes(
        self, entries: list[Any], sizes: dict[int, tuple[int, int]], labels: dict[int, int]
    ) -> Iterator[tuple[int, _Box]]:
        """Yield the id of the image, and the box, of each annotation."""

        def parse(entry: dict[str, Any]) -> tuple[int, _Box]:
            image, category = entry.get("image_id"), entry.get("category_id")
            if not _is_int(image) or image not in sizes:
                raise ValueError(f"image_id={image!r} is the id of no image")
            if not _is_int(category) or category not in labels:
                raise ValueError(f"category_id={category!r} is the id of no category")
            crowd = entry.get("iscrowd", 0)
            if crowd not in (0, 1):
                raise ValueError(f"iscrowd={crowd!r} is not valid; allowed: 0, 1")
            corners = _corners(entry.get("bbox"), sizes[image])
            return image, _Box(corners, labels[category], bool(crowd))

        yield from self._by_id("annotation", entries, parse).values()

    def _by_id(
        self, kind: str, entries: list[Any], parse: Callable[[dict[str, Any]], T]
    ) -> dict[int, T]:
        """Return what `parse` returns for each object of a list, by the object's id."""
        seen: set[int] = set()
        parsed: dict[int, T] = {}
        for position, entry in enumerate(entries, 1):
            key = entry.get("id") if isinstance(entry, dict) else None
            if not _is_int(key):
                self.problems.append(f"{kind} number {position} of the list has no integer id")
                continue
            if key in seen:
                self.problems.append(f"{kind} {key}: another one has the same id")
                continue
            seen.add(key)
            try:
                parsed[key] = parse(entry)
            except ValueError as error:
                self.problems.append(f"{kind} {key}: {error}")
        return parsed

    def _image(self, entry: dict[str, Any]) -> tuple[Path, tuple[int, int]]:
        """Return the file of an image, and its height and width."""
        name, height, width = (entry.get(key) for key in ("file_name", "height", "width"))
        if not isinstance(name, str) or not name or not name.isprintable():
            raise ValueError(f"file_name={name!r} is not the name of a file")
        inner = PurePosixPath(name)
        if inner.is_absolute() or ".." in inner.parts or "\\" in name:
            raise ValueError(f"file_name={name!r} leads out of {self.file.parent}")
        if not (_is_int(height) and _is_int(width) and height > 0 and width > 0):
            raise ValueError(
                f"height={height!r}, width={width!r} are not valid; allowed: integers above 0"
            )
        folders = (self.file.parent, self.file.parent / "images")
        path = next((folder / inner for folder in folders if _is_file(folder / inner)), None)
        if path is None:
            raise ValueError(
                f"file_name={name!r} does not exist in {printable(self.file.parent)} or in "
                "images/ there"
            )
        return path, (height, width)

    def _raise_problems(self) -> None:
        if self.problems:
            raise UserError(
                f"{printable(self.file)} is not valid as annotations in COCO's format:"
                f"{join_lines(self.problems)}"
            )


def _category_name(entry: dict[str, Any]) -> str:
    name = entry.get("name")
    if not isinstance(name, str) or not name or not name.isprintable():
        raise ValueError(f"name={name!r} is not a name that can be printed")
    return name


def _corners(bbox: object, size: tuple[int, int]) -> list[float]:
    """Return (x1, y1, x2, y2) of COCO's (x, y, width, height), cut off at the image.

    Raises:
        ValueError: It is not a box inside of the image.
    """
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_number, bbox)):
        raise ValueError(f"bbox={bbox!r} is not valid; allowed: [x, y, width, height]")
    x, y, width, height = bbox
    if width <= 0 or height <= 0:
        raise ValueError(f"bbox={bbox} has no area")
    rows, columns = size
    corners = [x, y, x + width, y + height]
    limits = (columns, rows, columns, rows)
    is_inside = all(
        -TOLERANCE <= value <= limit + TOLERANCE
        for value, limit in zip(corners, limits, strict=True)
    )
    cut = [min(max(value, 0.0), limit) for value, limit in zip(corners, limits, strict=True)]
    if not is_inside or cut[0] >= cut[2] or cut[1] >= cut[3]:
        raise ValueError(
            f"bbox={bbox} is outside of its image, which has {columns} x {rows} pixels"
        )
    return cut


def _tensor(values: list[Any], dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and math.isfinite(value)  # type: ignore[arg-type]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False
