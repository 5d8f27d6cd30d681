"""Datasets of the library `datasets`: saved by it, in files, or on the hub."""

from __future__ import annotations

import importlib
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

from app.runtime.errors import UserError, nearest, one_of

FILES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}
MODES = ("L", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB")  # a byte for each channel
SECONDS = 10  # for the hub to answer at all


def hugging_face(
    path: str,
    split: str,
    inputs: str = "image",
    targets: str = "label",
    name: str | None = None,
    image_mode: str | None = None,
    transforms: dict[str, Callable[[Tensor], Tensor]] | None = None,
) -> HuggingFace:
    """A split of a dataset, read sample by sample.

    Args:
        path: A folder that `save_to_disk` wrote, a folder or file that `load_dataset` reads, or a
            name on the hub. A dataset's own code is never run.
        split: For instance train.
        inputs: Name of the column of inputs.
        targets: Name of the column of targets.
        name: Of a configuration, where there are several.
        image_mode: Pillow's name of what images are converted to, as RGB or L; None leaves them.
        transforms: Named, applied to each input in turn; they must end in one size.

    Raises:
        UserError: The library is not installed, or the data, the split or a column is not there.
    """
    if image_mode is not None and image_mode not in MODES:
        close = nearest(image_mode, MODES)
        raise UserError(f"image_mode={image_mode!r} is not known; allowed: {one_of(MODES)}{close}")
    library = _library()
    rows = _load(library, path, split, name)
    for column in (inputs, targets):
        if column not in rows.column_names:
            has, close = one_of(rows.column_names), nearest(column, rows.column_names)
            raise UserError(f"{path}: no column {column!r}; it has: {has}{close}")
    steps = v2.Compose(list(transforms.values())) if transforms else None
    return HuggingFace(rows, inputs, targets, image_mode, steps)


class HuggingFace(Dataset[tuple[Tensor, Any]]):
    """A sample is (input, target).

    Images are uint8 of shape (C, H, W); where they are the targets, int64 of shape (H, W). Numbers
    and lists of them are tensors, labels are int.

    Args:
        rows: A `datasets.Dataset`.
        inputs: Name of the column of inputs.
        targets: Name of the column of targets.
        image_mode: What images of the inputs are converted to, or None.
        transform: Applied to each input, or None.

    Attributes:
        classes: Their names, where the targets are labels with names.
        targets: The label of each sample, where the targets are labels.
    """

    def __init__(
        self,
        rows: Any,
        inputs: str,
        targets: str,
        image_mode: str | None,
        transform: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.rows = rows.select_columns(list({inputs: None, targets: None})).with_format(None)
        self.columns = inputs, targets
        self.image_mode, self.transform = image_mode, transform
        feature = rows.features[targets]
        self.classes: list[str] | None = getattr(feature, "names", None)
        # Arrays have a dtype too.
        labels = type(feature).__name__ in ("ClassLabel", "Value") and "int" in feature.dtype
        self.targets: list[int] | None = self.rows[targets][:] if labels else None
        if self.targets is not None and None in self.targets:
            raise UserError(f"sample {self.targets.index(None)} has no value in {targets!r}")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        inputs, targets = self.columns
        try:
            row = self.rows[index]
        except (OSError, Image.DecompressionBombError) as error:  # Pillow's others are OSErrors
            raise UserError(f"sample {index} cannot be read: {error}") from error
        x = self._input(f"sample {index}, column {inputs!r}", row[inputs])
        return x, _target(f"sample {index}, column {targets!r}", row[targets])

    def _input(self, where: str, value: Any) -> Tensor:
        if isinstance(value, Image.Image):
            x = _pixels(where, value.convert(self.image_mode) if self.image_mode else value)
        else:
            x = _numbers(where, value)
        return x if self.transform is None else self.transform(x)


def _target(where: str, value: Any) -> Any:
    if isinstance(value, Image.Image):
        mask = _pixels(where, value)
        if len(mask) != 1:
            raise UserError(f"{where}: a mask of {len(mask)} channels; allowed: 1")
        return mask[0].long()
    return int(value) if isinstance(value, int) else _numbers(where, value)


def _pixels(where: str, image: Image.Image) -> Tensor:
    pixels: Tensor = pil_to_tensor(image)
    if pixels.dtype != torch.uint8:
        raise UserError(f"{where}: an image of mode {image.mode}; set image_mode, as RGB or L")
    return pixels


def _numbers(where: str, value: Any) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = type(value).__name__
        raise UserError(f"{where} is of type {kind}; allowed: images, numbers, labels") from error


def _library() -> Any:
    try:
        library = importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise UserError(MISSING) from error
    # A folder of that name, as that of downloads, imports as an empty package.
    if not hasattr(library, "load_dataset"):
        raise UserError(MISSING)
    return library


MISSING = 'data of Hugging Face needs datasets: pip install -e ".[hugging_face]"'


def _load(library: Any, path: str, split: str, name: str | None) -> Any:
    local = Path(path).expanduser()
    try:
        if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
            return _saved(library.load_from_disk(str(local)), path, split)
        if local.is_file():
            return _file(library, local, split)
        if local.is_dir():
            return library.load_dataset(str(local), name=name, split=split)
        with _offline_where_hub_is_silent(library):
            return library.load_dataset(path, name=name, split=split)
    except UserError:
        raise
    except ConnectionError as error:
        raise UserError(
            f"path={path!r} is no file or folder here, and {library.config.HF_ENDPOINT}, which may "
            "have it, cannot be reached"
        ) from error
    except (library.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(f"{error} ({error.__cause__})".split()).removesuffix(" (None)")
        raise UserError(f"path={path!r}, split={split!r} cannot be loaded: {reason}") from error


def _saved(found: Any, path: str, split: str) -> Any:
    """A folder holds several splits, or one that may have no name."""
    splits = found if isinstance(found, dict) else {str(found.split or "train"): found}
    if split not in splits:
        raise UserError(f"{path}: no split {split!r}; it has: {one_of(splits)}")
    return splits[split]


def _file(library: Any, path: Path, split: str) -> Any:
    if path.suffix not in FILES:
        raise UserError(f"{path} is of no known kind; allowed: {one_of(FILES)}, or a folder")
    return library.load_dataset(FILES[path.suffix], data_files=str(path), split=split)


@contextmanager
def _offline_where_hub_is_silent(library: Any) -> Iterator[None]:
    """Left to itself, the library tries for minutes before it looks at what it has downloaded."""
    before = library.config.HF_HUB_OFFLINE
    library.config.HF_HUB_OFFLINE = before or not _answers(library.config.HF_ENDPOINT)
    try:
        yield
    finally:
        library.config.HF_HUB_OFFLINE = before


def _answers(address: str) -> bool:
    try:
        request = urllib.request.Request(address, method="HEAD")
        with urllib.request.urlopen(request, timeout=SECONDS):
            return True
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)
    except OSError:
        return False
