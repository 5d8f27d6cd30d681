"""Pictures of a few samples and of what the model makes of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.utils import make_grid

from app.callbacks.callback import Callback, StageStart, StepEnd
from app.callbacks.predictions import check_when, class_outputs, is_due, targets_of
from app.figures import save_figure
from app.files import write_whole
from app.history import History
from app.nested import Key, Nested, map_tensors, pick
from app.predictions import WHOLE, flattened, image, label_image
from app.records import StageResult

log = logging.getLogger(__name__)
STAGES = ("train", "valid", "test")
Named = dict[str, Tensor]  # by the names of `flattened`


class SampleImages(Callback):
    """Draws `samples/epoch001_valid.png`: the first inputs, and what the model makes of them.

    Labels of whole images become titles; label maps and images stand below the inputs.

    Args:
        folder: Of the run.
        config: Says which parts of a batch are inputs and targets, and which outputs are logits.
        stages: `train`, `valid`, `test`.
        count: How many samples.
        every_n_epochs: Of the stages in training; all else is always drawn.

    Raises:
        UserError: A stage is of another name.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        stages: Sequence[str] = ("valid",),
        count: int = 8,
        every_n_epochs: int = 1,
    ) -> None:
        check_when(stages, STAGES, every_n_epochs)
        self.folder, self.config = folder / "samples", config
        self.stages, self.count, self.every_n_epochs = stages, count, every_n_epochs
        self.samples = Samples(config, 0)

    def on_stage_start(self, start: StageStart) -> None:
        due = start.stage in self.stages and is_due(start, self.every_n_epochs, self.config)
        self.samples = Samples(self.config, self.count if due else 0)

    def on_step_end(self, step: StepEnd) -> None:
        self.samples.add(step)

    def on_stage_end(self, result: StageResult, history: History) -> None:  # noqa: ARG002
        if self.samples.is_empty:
            return
        path = self.folder / f"epoch{result.epoch:03d}_{result.stage}.png"
        rows, titles = self.samples.pictures(), self.samples.titles()
        if not rows:
            log.warning("no samples of %s: no part of the inputs is an image", result.stage)
        elif titles:
            save_figure(path, titled(rows["inputs"], titles))
        else:
            picture = image(grid(list(rows.values())).numpy())
            write_whole(path, lambda file: picture.save(file, format="png"))


class Samples:
    """The first samples of a stage; they stay on the device until they are asked for.

    Args:
        config: Says which parts of a batch are inputs and targets, and which outputs are logits.
        count: How many.
    """

    def __init__(self, config: dict[str, Any], count: int) -> None:
        self.config, self.wanted = config, count
        self.kept: list[tuple[Nested, Nested, Nested]] = []

    def add(self, step: StepEnd) -> None:
        """Keeps of a batch what is still wanted."""
        if self.wanted > 0:
            inputs = pick(step.batch, self.config["data"]["inputs"])
            parts = (inputs, step.outputs, targets_of(step.batch, self.config))
            self.kept.append(map_tensors(self._first, parts))
            self.wanted -= step.num_samples

    def _first(self, tensor: Tensor) -> Tensor:
        """A copy, so that the rest of the batch is not kept with it."""
        return tensor[: self.wanted].detach().clone() if tensor.ndim else tensor

    @property
    def is_empty(self) -> bool:
        """Whether nothing was kept."""
        return not self.kept

    def named(self) -> tuple[Named, Named, Named]:
        """Inputs, outputs and targets by name, on the host."""
        inputs, outputs, targets = (_joined(parts) for parts in zip(*self.kept, strict=True))
        return inputs, outputs, targets

    def pictures(self) -> dict[str, Tensor]:
        """See the function `pictures`."""
        return pictures(*self.named(), self._classes())

    def titles(self) -> list[str]:
        """For each sample its predicted and its true label; none where it has no such labels."""
        _, outputs, targets = self.named()
        logits = [o for name, o in outputs.items() if name in self._classes() and o.ndim == 2]
        labels = [t for t in targets.values() if t.ndim == 1 and not t.is_floating_point()]
        if not logits:
            return []
        predicted = logits[0].argmax(1).tolist()
        true = labels[0].tolist() if labels else ["?"] * len(predicted)
        return [f"{p} / {t}" for p, t in zip(predicted, true, strict=True)]

    def _classes(self) -> set[str]:
        return {_name(key) for key in class_outputs(self.config)}


def _name(key: Key) -> str:
    return WHOLE if key is None else str(key)


def _joined(parts: Sequence[Nested]) -> Named:
    if parts[0] is None:
        return {}
    batches = [dict(flattened(part)) for part in parts]
    return {
        name: torch.cat([batch[name] for batch in batches]).cpu()
        for name, tensor in batches[0].items()
        if tensor.ndim
    }


def pictures(
    inputs: Named, outputs: Named, targets: Named, classes: Collection[str]
) -> dict[str, Tensor]:
    """All that can be seen, each (N, 3, height, width) in [0, 1].

    Args:
        inputs: By name, as of `flattened`.
        outputs: Likewise.
        targets: Likewise.
        classes: Which outputs are logits of classes.

    Returns:
        `inputs`; then of outputs that are images themselves `outputs`, of dense logits `labels`;
        then `targets` beside those of their kind. Nothing where no input is an image.
    """
    shown = {_titled("inputs", name): scaled(t) for name, t in inputs.items() if t.ndim == 4}
    if not shown:
        return {}
    dense = {name: o for name, o in outputs.items() if o.ndim == 4}
    logits = {name: o for name, o in dense.items() if name in classes}
    images = {name: o for name, o in dense.items() if name not in classes and o.shape[1] in (1, 3)}
    shown |= {_titled("outputs", name): scaled(o) for name, o in images.items()}
    shown |= {_titled("labels", name): label_maps(o) for name, o in logits.items()}
    channels = max((o.shape[1] for o in logits.values()), default=0)
    for name, target in targets.items():
        if logits and _is_label_map(target):
            shown[_titled("targets", name)] = label_maps(one_hot(target, channels))
        elif images and target.ndim == 4 and target.shape[1] in (1, 3):
            shown[_titled("targets", name)] = scaled(target)
    return shown


def _titled(kind: str, name: str) -> str:
    return f"{kind}_{name}" if name else kind


def _is_label_map(target: Tensor) -> bool:
    flat = target.ndim == 3 or (target.ndim == 4 and target.shape[1] == 1)
    return flat and not target.is_floating_point()


def scaled(images: Tensor) -> Tensor:
    """From the least value (black) to the greatest (white); of many channels the first is shown."""
    shown = (images if images.shape[1] in (1, 3) else images[:, :1]).float().nan_to_num()
    low, high = shown.amin(), shown.amax()
    return ((shown - low) / (high - low).clamp(min=1e-12)).expand(-1, 3, -1, -1)


def label_maps(logits: Tensor) -> Tensor:
    """Of logits (N, K, height, width) the label of each pixel, in colors."""
    colored = [np.asarray(label_image(one.float().numpy()).convert("RGB")) for one in logits]
    return torch.from_numpy(np.stack(colored)).permute(0, 3, 1, 2) / 255


def one_hot(labels: Tensor, channels: int) -> Tensor:
    """Logits that give these labels; what is no class, as an ignored pixel, becomes 0."""
    labels = labels.squeeze(1) if labels.ndim == 4 else labels
    return labels.unsqueeze(1) == torch.arange(max(channels, 2)).view(1, -1, 1, 1)


def grid(rows: Sequence[Tensor]) -> Tensor:
    """Rows of pictures as one; those of fewer pixels are enlarged to the largest."""
    size = [max(row.shape[side] for row in rows) for side in (2, 3)]
    whole: Tensor = make_grid(
        torch.cat([interpolate(row, size) for row in rows]), nrow=len(rows[0])
    )
    return whole


def titled(images: Tensor, titles: Sequence[str]) -> Figure:
    """Pictures with titles, eight in a row at most."""
    columns = min(len(images), 8)
    lines = math.ceil(len(images) / columns)
    figure = Figure(figsize=(1.5 * columns, 1.8 * lines), layout="constrained")
    figure.suptitle("predicted / true", size=9)
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for place in axes:
        place.axis("off")
    for place, picture, title in zip(axes, images, titles, strict=False):
        place.imshow(picture.permute(1, 2, 0).numpy())
        place.set_title(title, size=9)
    return figure
