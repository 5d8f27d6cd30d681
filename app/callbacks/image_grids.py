"""The first samples of a stage, and what of them can be seen."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.utils import make_grid

from app.callbacks.prediction_files import WHOLE, flattened, label_image
from app.callbacks.selection import class_outputs, targets_of
from app.runtime.nested import Key, Nested, map_tensors, pick
from app.training.events import StepEnd

Named = dict[str, Tensor]  # by the names of `flattened`


class SampleBuffer:
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
        return images(*self.named(), self._classes())

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


def images(
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
