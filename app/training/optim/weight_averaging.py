"""Averages of the weights (EMA and SWA), used wherever the model is evaluated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from app.distributed.strategies import shard_like
from app.training.optim.freezing import frozen_modules


class WeightAveraging:
    """Base class of weight averages; on its own it keeps none.

    Subclasses override `update` or `on_epoch_end` to add the current weights to the average.
    Training itself always continues from the weights that were not averaged.

    Args:
        model: Model whose weights are averaged.
        start_epoch: First epoch whose weights are averaged, counted from 1.

    Attributes:
        average: Averaged tensors by state dict name; empty until the first update.
        num_averaged: Number of updates that the average contains.
    """

    updates_per_step = False  # whether the average is updated after optimizer steps
    needs_bn_update = False  # whether batch norm statistics must be recomputed for the average

    def __init__(self, model: nn.Module, start_epoch: int = 1) -> None:
        if start_epoch < 1:
            raise ValueError(f"start_epoch={start_epoch} must be at least 1")
        self.model, self.start_epoch = model, start_epoch
        self.average: dict[str, Tensor] = {}
        self.num_averaged = 0

    def update(self, epoch: int, steps: int) -> None:
        """Called after each batch of training.

        Args:
            epoch: Current epoch, counted from 1.
            steps: Number of optimizer steps so far; unchanged if this batch made none.
        """

    def on_epoch_end(self, epoch: int) -> None:
        """Called after the last training step of an epoch, before validation."""

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Replace the weights of the model by the average inside the `with` block, if any."""
        if not self.average:
            yield
            return
        own = {name: tensor.clone() for name, tensor in state_tensors(self.model).items()}
        _copy_tensors(self.average, state_tensors(self.model))
        try:
            yield
        finally:
            _copy_tensors(own, state_tensors(self.model))

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint: tensors and plain values."""
        return {"average": self.average, "num_averaged": self.num_averaged}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        own, self.num_averaged = state_tensors(self.model), state["num_averaged"]
        self.average = {
            name: shard_like(tensor.to(own[name].device), own[name])
            for name, tensor in state["average"].items()
        }

    def _update_average(self, avg_fn: Any) -> None:
        """Add the current weights by a `multi_avg_fn` of `torch.optim.swa_utils`."""
        current = state_tensors(self.model)
        if not self.average:
            self.average = {name: tensor.clone() for name, tensor in current.items()}
        else:
            names = [name for name, tensor in current.items() if tensor.is_floating_point()]
            averaged = [self.average[name] for name in names]
            avg_fn(averaged, [current[name] for name in names], self.num_averaged)
            integers = {n: t for n, t in current.items() if not t.is_floating_point()}
            _copy_tensors(integers, self.average)
        self.num_averaged += 1


class ExponentialMovingAverage(WeightAveraging):
    """Exponential moving average of weights and buffers (Polyak and Juditsky 1992).

    Args:
        model: Model whose weights are averaged.
        decay: Factor of the previous average in each update, at least 0 and below 1.
        every_n_steps: Number of optimizer steps between two updates.
        start_epoch: First epoch whose weights are averaged, counted from 1.
        warmup: Whether the decay is at most (1 + n) / (10 + n) after n updates, so that the average
            soon forgets the weights of the beginning.
    """

    updates_per_step = True

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.999,
        every_n_steps: int = 1,
        start_epoch: int = 1,
        warmup: bool = False,
    ) -> None:
        super().__init__(model, start_epoch)
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} must be at least 0 and below 1")
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps} must be at least 1")
        self.every_n_steps, self.last_averaged_step = every_n_steps, 0
        self.decay, self.warmup = decay, warmup

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "last_averaged_step": self.last_averaged_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.last_averaged_step = state["last_averaged_step"]

    def update(self, epoch: int, steps: int) -> None:
        is_due = steps != self.last_averaged_step and steps % self.every_n_steps == 0
        if is_due and epoch >= self.start_epoch:
            self.last_averaged_step = steps
            self._update_average(get_ema_multi_avg_fn(self.next_decay))

    @property
    def next_decay(self) -> float:
        """Factor of the previous average in the next update."""
        warm = (1 + self.num_averaged) / (10 + self.num_averaged)
        return min(self.decay, warm) if self.warmup else self.decay


class StochasticWeightAveraging(WeightAveraging):
    """Mean of the weights at the end of each epoch (Izmailov et al. 2018, algorithm 1).

    The statistics of batch normalization are recomputed on the training data whenever the average
    is used, which costs one forward pass over them.

    Args:
        model: Model whose weights are averaged.
        start_epoch: First epoch whose weights are averaged, counted from 1.
    """

    needs_bn_update = True

    def __init__(self, model: nn.Module, start_epoch: int) -> None:
        super().__init__(model, start_epoch)
        self.avg_fn = get_swa_multi_avg_fn()

    def on_epoch_end(self, epoch: int) -> None:
        if epoch >= self.start_epoch:
            self._update_average(self.avg_fn)


@contextmanager
def recompute_bn_stats(model: nn.Module) -> Iterator[list[nn.Module]]:
    """Reset the running statistics of batch normalization and recompute them inside the block.

    Like `torch.optim.swa_utils.update_bn`, but the caller runs the forward passes. Afterwards the
    statistics are the mean over all batches that went through the model. Frozen modules keep their
    statistics; modules of other kinds keep their mode.

    Yields:
        The modules whose statistics are recomputed; if it is empty no forward pass is needed.
    """
    batchnorm, frozen = torch.nn.modules.batchnorm._BatchNorm, frozen_modules(model)
    modules = [
        module
        for module in model.modules()
        if isinstance(module, batchnorm) and module.track_running_stats and module not in frozen
    ]
    momenta = [module.momentum for module in modules]
    for module in modules:
        module.reset_running_stats()
        module.momentum = None  # cumulative average: all batches count the same
        module.train()
    try:
        yield list(modules)
    finally:
        for module, momentum in zip(modules, momenta, strict=True):
            module.momentum = momentum
            module.eval()


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the model's state dict, detached, sharing memory with the model."""
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def _copy_tensors(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for name, tensor in source.items():
        target[name].copy_(tensor)
