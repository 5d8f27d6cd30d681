"""The loader protocol of the training loop, and the preparation of batches on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from app.runtime.nested import Nested, iter_tensors, map_tensors, pick, replace

Batch = Nested
Transform = Callable[[Tensor], Tensor]
Inputs = int | str | list[int | str] | None


class BatchLoader(Protocol):
    """Interface between the training loop and its data.

    With several ranks, `epoch` yields this rank's share of each batch; everything else refers to
    global batches.

    Attributes:
        num_samples: Samples per epoch, or None if unknown.
        num_batches: Batches per epoch, or None if unknown.
    """

    @property
    def num_samples(self) -> int | None: ...

    @property
    def num_batches(self) -> int | None: ...

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of an epoch on the training device; None where the share is empty."""

    def first(self, count: int) -> Batch:
        """Return the first `count` samples of the dataset as a batch."""


@dataclass(frozen=True)
class BatchPreparer:
    """Moves a batch to the device and transforms its inputs there.

    Attributes:
        device: Target device.
        transform: Applied to each tensor of the inputs; None for no transform.
        inputs: Key or keys of the inputs within a batch (position or name); None for the entire
            batch.
    """

    device: torch.device
    transform: Transform | None = None
    inputs: Inputs = 0

    @property
    def is_deterministic(self) -> bool:
        """Whether a sample gives the same result in any batch and in any epoch."""
        return self.transform is None or getattr(self.transform, "is_deterministic", False)

    def __call__(self, batch: Batch) -> Batch:
        """Move a batch to the device, and transform it."""
        return self.on_device(self.move(batch))

    def stream(
        self, batches: Iterable[Batch | None], copies_ahead: bool = True
    ) -> Iterator[Batch | None]:
        """Prepare batches.

        Args:
            batches: Batches as they are read; None, for a share that is empty, is passed on.
            copies_ahead: Whether to read a batch and copy it to a CUDA device while the one before
                it is used. Reading must not draw random numbers then, which steps draw, too.
        """
        if self.device.type != "cuda" or not copies_ahead:
            for batch in batches:
                yield None if batch is None else self(batch)
            return
        copies, earlier = torch.cuda.Stream(self.device), None
        for batch in batches:
            with torch.cuda.stream(copies):
                following = self.move(batch), copies.record_event()
            if earlier is not None:
                yield self._received(*earlier)
            earlier = following
        if earlier is not None:
            yield self._received(*earlier)

    def _received(self, batch: Batch | None, copied: torch.cuda.Event) -> Batch | None:
        """Transform a batch that a stream copies to the device, once it is there."""
        if batch is None:
            return None
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(copied)
        for tensor in iter_tensors(batch):
            tensor.record_stream(stream)  # its memory is not reused before this stream is done
        return self.on_device(batch)

    def move(self, batch: Batch | None) -> Batch | None:
        """Move a batch to the device; nothing waits for it."""
        return map_tensors(lambda tensor: to_device(tensor, self.device), batch)

    def on_device(self, batch: Batch) -> Batch:
        """Transform a batch that is on the device."""
        if self.transform is None:
            return batch
        return map_inputs(partial(map_tensors, self.transform), batch, self.inputs)


@dataclass(frozen=True)
class Masks:
    """The masks of the inputs, which are transformed together with them.

    Attributes:
        key: Key of the masks within a sample or a batch.
        outside: Label of pixels that a transform moves in from outside of the image.
    """

    key: int | str
    outside: int

    def replace_both(self, sample: Nested, inputs: Inputs, images: Tensor, masks: Tensor) -> Nested:
        """Return a copy of a sample or batch with other images and masks."""
        assert isinstance(inputs, (int, str))
        return replace(replace(sample, inputs, images), self.key, masks)


@dataclass(frozen=True)
class MaskBatchPreparer(BatchPreparer):
    """Moves a batch to the device, and transforms images and masks there; masks become int64.

    Attributes:
        masks: The masks of the inputs.
        transform_both: Called with images, masks and the label outside of images; returns the
            transformed images and masks.
    """

    masks: Masks = field(kw_only=True)
    transform_both: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor | None]] = field(
        kw_only=True
    )

    def on_device(self, batch: Batch) -> Batch:
        masks = self.masks
        images, labels = self.transform_both(
            pick(batch, self.inputs), pick(batch, masks.key), masks.outside
        )
        assert labels is not None
        return masks.replace_both(batch, self.inputs, images, labels.long())


def map_inputs(function: Callable[[Any], Any], sample: Nested, inputs: Inputs) -> Nested:
    """Replace the inputs of a sample or batch by the function's results for them.

    Args:
        function: Called for each selected input.
        sample: Tuple, list or dict.
        inputs: Key or keys of the inputs; None for the entire sample.
    """
    if inputs is None:
        return function(sample)
    for key in inputs if isinstance(inputs, list) else [inputs]:
        sample = replace(sample, key, function(pick(sample, key)))
    return sample


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to the device; copies from the CPU to CUDA are asynchronous."""
    if tensor.device.type == device.type:
        return tensor
    if device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
