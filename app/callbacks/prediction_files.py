"""Files of what a model predicts: tables, pictures, arrays."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from app.runtime.errors import UserError
from app.runtime.files import atomic_write, write_csv
from app.runtime.nested import Key, Nested

Format = Literal["auto", "csv", "png", "npz"]
WHOLE = ""  # the name of outputs that are a single tensor


class PredictionFiles:
    """Writes the outputs of a model as they come.

    A tensor (N, K) becomes a table: labels and probabilities where it holds logits of classes,
    else a column for each output. Of (N, K, height, width) each sample becomes a picture: of its
    labels, or the image itself. All else becomes arrays. Several outputs have files of their own.

    Args:
        folder: Files go there.
        classes: Which outputs are logits of classes: keys of nested outputs, None for the whole.
        format: `auto` is csv, png or npz as said above.
        names: Of the samples, in order; None numbers them.
    """

    def __init__(
        self,
        folder: Path,
        classes: Collection[Key] = (),
        format: Format = "auto",
        names: Sequence[str] | None = None,
    ) -> None:
        self.folder, self.format, self.names = folder, format, names
        self.classes = {WHOLE if key is None else str(key) for key in classes}
        self.parts: dict[str, list[Tensor]] = {}
        self.targets: list[Tensor] = []
        self.done: dict[str, int] = {}
        stems = [str(Path(name).with_suffix("")) for name in names or ()]
        # cat.jpg and cat.png are two samples
        self.stems = stems if len({*stems}) == len(stems) else list(names or ())

    def add(self, outputs: Nested, targets: Nested = None) -> None:
        """A batch; targets are kept where they are one label for each sample."""
        if isinstance(targets, Tensor) and targets.ndim == 1:
            self.targets.append(targets.cpu())
        for name, tensor in flattened(outputs):
            tensor = tensor.detach().cpu().float()
            if self._format(name, tensor) == "png":
                self._write_images(name, tensor)
            else:
                self.parts.setdefault(name, []).append(tensor)

    def close(self) -> None:
        """All batches have come."""
        for name, parts in self.parts.items():
            values = [part.numpy() for part in parts]
            whole = np.concatenate(values)
            stem = "predictions" + (f"_{name}" if name else "")
            if self._format(name, parts[0]) == "csv":
                write_csv(self.folder / f"{stem}.csv", self._table(name, whole))
            else:
                content = io.BytesIO()
                named = {"labels": whole.argmax(1)} if name in self.classes else {}
                np.savez_compressed(content, allow_pickle=False, outputs=whole, **named)
                atomic_write(self.folder / f"{stem}.npz", lambda f: f.write(content.getvalue()))  # noqa: B023

    def _format(self, name: str, tensor: Tensor) -> str:
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
        image = tensor.ndim == 4 and (name in self.classes or tensor.shape[1] in (1, 3))
        return "png" if image else "npz"

    def _table(self, name: str, values: np.ndarray) -> pd.DataFrame:
        found = table(values, name in self.classes)
        if self.names is not None:
            found["sample"] = self.names
        if sum(map(len, self.targets)) == len(values):
            found.insert(1, "target", np.concatenate([part.numpy() for part in self.targets]))
        return found

    def _write_images(self, name: str, batch: Tensor) -> None:
        first = self.done.get(name, 0)
        folder = self.folder / ("predictions" + (f"_{name}" if name else ""))
        for place, values in enumerate(batch.numpy(), first):
            stem = self.stems[place] if self.stems else f"{place:06d}"
            picture = label_image(values) if name in self.classes else image(values)
            content = io.BytesIO()
            picture.save(content, format="png")
            atomic_write(folder / f"{stem}.png", lambda f: f.write(content.getvalue()))  # noqa: B023
        self.done[name] = first + len(batch)


def table(values: np.ndarray, classes: bool) -> pd.DataFrame:
    """A line for each sample.

    Args:
        values: Of shape (N,) or (N, K).
        classes: Whether they are logits: then there are labels and probabilities.
    """
    samples = {"sample": np.arange(len(values))}
    if values.ndim == 1:
        return pd.DataFrame(samples | {"output": values})
    columns = range(values.shape[1])
    if not classes:
        return pd.DataFrame(samples | {f"output_{k}": values[:, k] for k in columns})
    shares = np.exp(values - values.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    probabilities = {f"probability_{k}": shares[:, k] for k in columns}
    return pd.DataFrame(samples | {"label": values.argmax(1)} | probabilities)


def flattened(outputs: Nested, prefix: str = WHOLE) -> Iterator[tuple[str, Tensor]]:
    """The tensors of samples in nested outputs by name; those of tuples are numbered."""
    if isinstance(outputs, Tensor):
        if outputs.ndim:  # a single number, as a loss, belongs to no sample
            yield prefix, outputs
        return
    if not isinstance(outputs, (dict, tuple, list)):
        return
    parts = outputs.items() if isinstance(outputs, dict) else enumerate(outputs)
    for name, part in parts:
        yield from flattened(part, f"{prefix}.{name}" if prefix else str(name))


def label_image(logits: np.ndarray) -> Image.Image:
    """Of logits (K, height, width) the label of each pixel; a palette makes them visible."""
    labels = logits.argmax(0) if len(logits) > 1 else (logits[0] > 0)
    picture = Image.fromarray(labels.astype(np.uint8), mode="P")
    colors = colormaps["tab20"](np.arange(20), bytes=True)[:, :3]
    picture.putpalette([0, 0, 0, *colors.flatten().tolist()])
    return picture


def image(values: np.ndarray) -> Image.Image:
    """An image (1 or 3, height, width) of values from 0 to 1; what is beyond them is cut off."""
    pixels = (values.clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
