"""Datasets of the Hugging Face library `datasets`: saved by it, in files, or on the hub."""

from __future__ import annotations

import importlib
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from app.data.archives import check_name
from app.data.images import open_image
from app.runtime.errors import UserError, did_you_mean, join_choices
from app.runtime.extras import import_extra

BUILDERS = {
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
IMAGE_MODES = ("L", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB")  # one byte per channel
COLUMN_TYPES = "images, numbers, labels"
HUB_TIMEOUT = 10  # seconds to wait for any answer of the hub


def hugging_face(
    path: str,
    split: str,
    inputs: str = "image",
    targets: str = "label",
    name: str | None = None,
    image_mode: str | None = None,
) -> HuggingFace:
    """Load a split of a dataset; samples are read one by one when they are indexed.

    Args:
        path: A folder written by `save_to_disk`, a folder or file that `load_dataset` reads, or a
            name on the hub. Loading scripts of datasets are never run.
        split: Name of the split, for instance `train`.
        inputs: Name of the column of inputs.
        targets: Name of the column of targets.
        name: Name of a dataset configuration, if there are several.
        image_mode: Pillow mode that input images are converted to, such as RGB or L; None keeps
            the mode.

    Raises:
        UserError: The library is not installed, or the data, the split or a column is missing.
    """
    if image_mode is not None and image_mode not in IMAGE_MODES:
        allowed, hint = join_choices(IMAGE_MODES), did_you_mean(image_mode, IMAGE_MODES)
        raise UserError(f"image_mode={image_mode!r} is unknown; allowed: {allowed}{hint}")
    # Of a submodule, because a folder named `datasets`, such as that of downloads, is imported as
    # an empty package.
    import_extra("datasets.load", "hugging_face")
    library = importlib.import_module("datasets")
    rows = _load_rows(library, path, split, name)
    for column in (inputs, targets):
        check_name(path, "column", column, rows.column_names)
    return HuggingFace(rows, inputs, targets, image_mode)


class HuggingFace(Dataset[tuple[Tensor, Any]]):
    """Rows of a `datasets.Dataset` as (input, target) samples.

    Images become uint8 of shape (C, H, W), or int64 masks of shape (H, W) if they are targets.
    Numbers and lists of numbers become tensors, labels become int.

    Args:
        rows: A `datasets.Dataset`.
        inputs: Name of the column of inputs.
        targets: Name of the column of targets.
        image_mode: Pillow mode that input images are converted to, or None.

    Attributes:
        classes: Class names, if the targets are labels with names.
        targets: The label of each sample, if the targets are labels.
    """

    def __init__(self, rows: Any, inputs: str, targets: str, image_mode: str | None) -> None:
        rows = rows.select_columns(list({inputs: None, targets: None})).with_format(None)
        self.modes = {name: getattr(rows.features[name], "mode", None) for name in rows.features}
        self.rows, self.columns = _without_decoding(rows), (inputs, targets)
        self.image_mode = image_mode
        feature = rows.features[targets]
        self.classes: list[str] | None = getattr(feature, "names", None)
        # The type is checked too, because arrays also have an integer dtype.
        has_labels = type(feature).__name__ in ("ClassLabel", "Value") and "int" in feature.dtype
        self.targets: list[int] | None = self.rows[targets][:] if has_labels else None
        if self.targets is not None and None in self.targets:
            raise UserError(f"sample {self.targets.index(None)} has no value in {targets!r}")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def location(self) -> str:
        """Names the rows and columns."""
        return f"hugging_face {self.fingerprint()}"

    def fingerprint(self) -> str:
        """Return the fingerprint that `datasets` gives to the rows, with the columns and mode."""
        return f"{self.rows._fingerprint} {self.columns} {self.image_mode}"

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        row, places = (
            self.rows[index],
            [f"sample {index}, column {name!r}" for name in self.columns],
        )
        x, y = (
            self._decode(place, name, row[name])
            for place, name in zip(places, self.columns, strict=True)
        )
        return self._to_input(places[0], x), _to_target(places[1], y)

    def _decode(self, location: str, column: str, value: Any) -> Any:
        """Decode an image as `datasets` does, but only in the formats that are allowed."""
        if not isinstance(value, dict) or value.keys() != {"bytes", "path"}:
            return value
        content, path = value["bytes"], value["path"]
        if content is None and not (path and Path(path).is_file()):
            raise UserError(f"{location}: the image file {path!r} does not exist")
        with open_image(path if content is None else BytesIO(content), location) as image:
            upright = ImageOps.exif_transpose(image)
        mode = self.modes[column]
        return upright.convert(mode) if mode else upright

    def _to_input(self, location: str, value: Any) -> Tensor:
        if isinstance(value, Image.Image):
            image = value.convert(self.image_mode) if self.image_mode else value
            return _to_pixels(location, image)
        return _to_tensor(location, value)


def _without_decoding(rows: Any) -> Any:
    """Return the rows with encoded images, because `datasets` decodes every format.

    Raises:
        UserError: A column has images in lists or dicts, or other media.
    """
    for name, feature in rows.features.items():
        if type(feature).__name__ == "Image":
            rows = rows.cast_column(name, replace(feature, decode=False))
        elif _has_media(feature):
            raise UserError(f"column {name!r} is of type {feature}; allowed: {COLUMN_TYPES}")
    return rows


def _has_media(feature: Any) -> bool:
    """Whether reading a column would decode images, audio or video, at any depth."""
    if isinstance(feature, dict):
        return any(map(_has_media, feature.values()))
    if isinstance(feature, (list, tuple)):
        return any(map(_has_media, feature))
    return hasattr(feature, "decode_example") or _has_media(getattr(feature, "feature", ()))


def _to_target(location: str, value: Any) -> Any:
    if isinstance(value, Image.Image):
        mask = _to_pixels(location, value)
        if len(mask) != 1:
            raise UserError(f"{location}: a mask with {len(mask)} channels; allowed: 1")
        return mask[0].long()
    return int(value) if isinstance(value, int) else _to_tensor(location, value)


def _to_pixels(location: str, image: Image.Image) -> Tensor:
    pixels: Tensor = pil_to_tensor(image)
    if pixels.dtype != torch.uint8:
        raise UserError(
            f"{location}: an image of mode {image.mode}; set image_mode, for instance to RGB or L"
        )
    return pixels


def _to_tensor(location: str, value: Any) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = type(value).__name__
        raise UserError(f"{location} is of type {kind}; allowed: {COLUMN_TYPES}") from error


def _load_rows(library: Any, path: str, split: str, name: str | None) -> Any:
    local = Path(path).expanduser()
    try:
        if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
            return _select_split(library.load_from_disk(str(local)), path, split)
        if local.is_file():
            return _load_file(library, local, split)
        if local.is_dir():
            return library.load_dataset(str(local), name=name, split=split)
        with _offline_if_hub_unreachable(library):
            return library.load_dataset(path, name=name, split=split)
    except UserError:
        raise
    except ConnectionError as error:
        raise UserError(
            f"path={path!r} is not a local file or folder, and the hub at "
            f"{library.config.HF_ENDPOINT} cannot be reached"
        ) from error
    except (library.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(f"{error} ({error.__cause__})".split()).removesuffix(" (None)")
        raise UserError(f"path={path!r}, split={split!r} cannot be loaded: {reason}") from error


def _select_split(saved: Any, path: str, split: str) -> Any:
    # A saved folder contains either several splits, or a single one that may have no name.
    splits = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
    if split not in splits:
        raise UserError(f"{path}: no split {split!r}; available: {join_choices(splits)}")
    return splits[split]


def _load_file(library: Any, path: Path, split: str) -> Any:
    if path.suffix not in BUILDERS:
        raise UserError(
            f"{path} has an unknown file type; allowed: {join_choices(BUILDERS)}, or a folder"
        )
    return library.load_dataset(BUILDERS[path.suffix], data_files=str(path), split=split)


@contextmanager
def _offline_if_hub_unreachable(library: Any) -> Iterator[None]:
    """Use downloaded data at once; by default the library retries for minutes before it does."""
    previous = library.config.HF_HUB_OFFLINE
    library.config.HF_HUB_OFFLINE = previous or not _is_reachable(library.config.HF_ENDPOINT)
    try:
        yield
    finally:
        library.config.HF_HUB_OFFLINE = previous


def _is_reachable(url: str) -> bool:
    try:
        request = urllib.request.Request(url, method="HEAD")
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT):
            return True
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)
    except OSError:
        return False
