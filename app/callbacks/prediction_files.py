"""Write the outputs of a model to files: tables, images and arrays."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from app.data.boxes import NO_BOX, boxes_in_files
from app.data.masks import IGNORE, Colors, color_table
from app.runtime.errors import UserError
from app.runtime.files import atomic_write, write_csv
from app.runtime.nested import Key, Nested

Format = Literal["auto", "csv", "png", "npz"]
SINGLE_OUTPUT = ""  # name of the output of a model that returns a single tensor


class PredictionFileWriter:
    """Write the outputs of a model batch by batch.

    With `format="auto"`, outputs (N, K) become a table: labels and probabilities if they are class
    logits, else one column per output. Outputs (N, K, height, width) become one PNG file per
    sample, named like its file if it has one: a label map if they are class logits, else the image
    itself, if K is 1 or 3. All other outputs become arrays. Each of several outputs has files of
    its own. Detections become a table with a row for each box, in pixels of the file of the image.

    Args:
        folder: Folder of the files.
        classes: Keys of the outputs that are class logits; None is the key of a single output.
        format: `auto` chooses csv, png or npz as described above.
        names: Names of the samples, in order; None numbers them.
        paths: The file of each sample, in order, for a column `path`; None if there are none.
        class_names: Names of the classes in the order of their labels; None if unknown.
        colors: Colors of the classes in label maps; see `class_colors`.
    """

    def __init__(
        self,
        folder: Path,
        classes: Collection[Key] = (),
        format: Format = "auto",
        names: Sequence[str] | None = None,
        paths: Sequence[str] | None = None,
        class_names: Sequence[str] | None = None,
        colors: Colors | None = None,
    ) -> None:
        self.folder, self.format, self.names = folder, format, names
        self.paths, self.class_names, self.colors = paths, class_names, colors
        self.logit_names = {output_name(key) for key in classes}
        self.batches: dict[str, list[Tensor]] = {}
        self.boxes: list[pd.DataFrame] = []
        self.num_samples = 0  # whose boxes were added
        self.targets: list[Tensor] = []
        self.num_images: dict[str, int] = {}
        files = list(names or paths or ())
        stems = [str(Path(name).with_suffix("")) for name in files]
        # Keep the suffixes if cat.jpg and cat.png would otherwise overwrite each other.
        self.stems = stems if len({*stems}) == len(stems) else files

    def add(self, outputs: Nested, targets: Nested = None) -> None:
        """Add a batch; targets are kept if they have shape (N,)."""
        if is_detections(outputs):
            self._add_boxes(outputs, targets)
            return
        if isinstance(targets, Tensor) and targets.ndim == 1:
            self.targets.append(targets.cpu())
        for name, tensor in flatten_outputs(outputs):
            tensor = tensor.detach().cpu().float()
            if self._choose_format(name, tensor) == "png":
                self._write_images(name, tensor)
            else:
                self.batches.setdefault(name, []).append(tensor)

    def close(self) -> list[Path]:
        """Write the tables and arrays, after the last batch.

        Returns:
            The tables, the arrays and the folders of images that were written.
        """
        written = [self.folder / labeled("predictions", name) for name in self.num_images]
        if self.boxes:
            written.append(self.folder / "predictions.csv")
            write_csv(written[-1], self._box_table())
        for name, batches in self.batches.items():
            values = np.concatenate([batch.numpy() for batch in batches])
            stem = labeled("predictions", name)
            if self._choose_format(name, batches[0]) == "csv":
                written.append(self.folder / f"{stem}.csv")
                write_csv(written[-1], self._table(name, values))
            else:
                labels = {"labels": values.argmax(1)} if name in self.logit_names else {}
                write = partial(np.savez_compressed, allow_pickle=False, outputs=values, **labels)
                written.append(self.folder / f"{stem}.npz")
                atomic_write(written[-1], write)
        return written

    def _choose_format(self, name: str, tensor: Tensor) -> str:
        if self.format != "auto":
            fits = {"csv": tensor.ndim <= 2, "png": tensor.ndim == 4, "npz": True}
            if not fits[self.format]:
                raise UserError(
                    f"format={self.format!r} does not fit outputs of shape "
                    f"{list(tensor.shape)}; allowed: auto, npz"
                )
            return self.format
        if tensor.ndim <= 2:
            return "csv"
        is_image = tensor.ndim == 4 and (name in self.logit_names or tensor.shape[1] in (1, 3))
        return "png" if is_image else "npz"

    def _table(self, name: str, values: np.ndarray) -> pd.DataFrame:
        table = prediction_table(values, name in self.logit_names)
        if self.names is not None:
            table["sample"] = self.names
        if sum(map(len, self.targets)) == len(values):
            table.insert(1, "target", np.concatenate([part.numpy() for part in self.targets]))
        if self.class_names is not None and values.shape[1:] == (len(self.class_names),):
            _insert_names(table, self.class_names)
        if self.paths is not None:
            table.insert(1, "path", self.paths[: len(values)])
        return table

    def _add_boxes(self, outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> None:
        if self.format not in ("auto", "csv"):
            raise UserError(f"format={self.format!r} does not fit boxes; allowed: auto, csv")
        boxes, labels, scores = (outputs[name].cpu() for name in ("boxes", "labels", "scores"))
        boxes = boxes_in_files(boxes, targets["size"].cpu(), targets["frame"].cpu())
        samples, places = (labels != NO_BOX).nonzero(as_tuple=True)
        corners = boxes[samples, places].unbind(1)
        columns = {
            "sample": samples + self.num_samples,
            "label": labels[samples, places],
            "score": scores[samples, places].float(),
            **dict(zip(("x1", "y1", "x2", "y2"), corners, strict=True)),
        }
        self.boxes.append(pd.DataFrame({name: part.numpy() for name, part in columns.items()}))
        self.num_samples += len(labels)

    def _box_table(self) -> pd.DataFrame:
        """Return the table of all boxes, those of each sample from the highest score down."""
        table = pd.concat(self.boxes, ignore_index=True)
        samples = table["sample"].tolist()
        if self.paths is not None:
            table.insert(1, "path", [self.paths[index] for index in samples])
        if self.names is not None:
            table["sample"] = [self.names[index] for index in samples]
        if self.class_names is not None:
            _insert_names(table, self.class_names)
        return table

    def _write_images(self, name: str, batch: Tensor) -> None:
        first = self.num_images.get(name, 0)
        folder = self.folder / labeled("predictions", name)
        for index, values in enumerate(batch.numpy(), first):
            stem = self.stems[index] if self.stems else f"{index:06d}"
            is_label_map = name in self.logit_names
            image = to_label_image(values, self.colors) if is_label_map else to_image(values)
            atomic_write(folder / f"{stem}.png", partial(image.save, format="png"))
        self.num_images[name] = first + len(batch)


def is_boxes(targets: Nested) -> bool:
    """Return whether targets, or outputs, are boxes with labels."""
    return isinstance(targets, dict) and {"boxes", "labels"} <= targets.keys()


def is_detections(outputs: Nested) -> bool:
    """Return whether the outputs of a model are detected boxes."""
    return is_boxes(outputs) and "scores" in outputs


def prediction_table(values: np.ndarray, classes: bool) -> pd.DataFrame:
    """Return a table with a row per sample.

    Args:
        values: Outputs of shape (N,) or (N, K).
        classes: Whether they are class logits, which become labels and probabilities.
    """
    samples = {"sample": np.arange(len(values))}
    if values.ndim == 1:
        return pd.DataFrame(samples | {"output": values})
    columns = range(values.shape[1])
    if not classes:
        return pd.DataFrame(samples | {f"output_{k}": values[:, k] for k in columns})
    softmax = np.exp(values - values.max(1, keepdims=True))
    softmax /= softmax.sum(1, keepdims=True)
    probabilities = {f"probability_{k}": softmax[:, k] for k in columns}
    return pd.DataFrame(samples | {"label": values.argmax(1)} | probabilities)


def _insert_names(table: pd.DataFrame, names: Sequence[str]) -> None:
    """Insert a column of class names after each column of labels."""
    for column in ("target", "label"):
        if column in table and pd.api.types.is_integer_dtype(table[column]):
            labels = table[column].tolist()
            texts = [names[k] if 0 <= k < len(names) else str(k) for k in labels]
            table.insert([*table.columns].index(column) + 1, f"{column}_name", texts)


def output_name(key: Key) -> str:
    """Return the name that `flatten_outputs` gives to the output with a key."""
    return SINGLE_OUTPUT if key is None else str(key)


def labeled(kind: str, name: str) -> str:
    """Return `<kind>_<name>`, or only the kind for the single output of a model."""
    return f"{kind}_{name}" if name else kind


def flatten_outputs(outputs: Nested, prefix: str = SINGLE_OUTPUT) -> Iterator[tuple[str, Tensor]]:
    """Yield the per-sample tensors in nested outputs with dotted names; sequences are numbered."""
    if isinstance(outputs, Tensor):
        if outputs.ndim:  # a scalar, such as a loss, has no value per sample
            yield prefix, outputs
        return
    if not isinstance(outputs, (dict, tuple, list)):
        return
    parts = outputs.items() if isinstance(outputs, dict) else enumerate(outputs)
    for name, part in parts:
        yield from flatten_outputs(part, f"{prefix}.{name}" if prefix else str(name))


def to_label_image(logits: np.ndarray, colors: Colors | None = None) -> Image.Image:
    """Return the most likely class of each pixel as a palette image.

    Args:
        logits: Class logits of shape (K, height, width); a single channel is binary.
        colors: Colors of the classes; see `class_colors`.
    """
    labels = logits.argmax(0) if len(logits) > 1 else (logits[0] > 0)
    image = Image.fromarray(labels.astype(np.uint8), mode="P")
    image.putpalette(class_colors(colors, max(2, len(logits))).flatten().tolist())
    return image


def class_colors(colors: Colors | None, num_classes: int) -> np.ndarray:
    """Return the color of each class, uint8 of shape (num_classes, 3).

    Args:
        colors: `data.colors`, which is used if it has as many classes. Otherwise class 0 is black.
        num_classes: Number of classes.
    """
    table = {} if colors is None else color_table(colors)
    known = [rgb for name, rgb in table.items() if name != IGNORE]
    if len(known) == num_classes:
        return np.array(known, np.uint8)
    strong_first = np.r_[0:20:2, 1:20:2][np.arange(num_classes - 1) % 20]
    palette = colormaps["tab20"](strong_first, bytes=True)[:, :3]
    return np.concatenate([np.zeros((1, 3), np.uint8), palette])


def to_image(values: np.ndarray) -> Image.Image:
    """Return an image of values (1 or 3, height, width), clipped to [0, 1]."""
    pixels = (values.clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
