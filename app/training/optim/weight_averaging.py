"""Averages of the weights, kept beside those that learn, and used wherever they are measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from app.distributed.strategies import shard_like


class WeightAveraging:
    """No average: the weights themselves. Subclasses say when and how one is taken.

    Args:
        model: With the weights that learn.
        start_epoch: The first whose weights count; from 1.
    """

    updates_per_step = False  # whether it takes the weights after steps of the optimizer
    needs_bn_update = False  # whether batch statistics must be found anew for the average

    def __init__(self, model: nn.Module, start_epoch: int = 1) -> None:
        if start_epoch < 1:
            raise ValueError(f"start_epoch={start_epoch} must be at least 1")
        self.model, self.start_epoch = model, start_epoch
        self.average: dict[str, Tensor] = {}
        self.count = 0  # of weights in the average

    def update(self, epoch: int, steps: int) -> None:
        """The optimizer has made so many steps."""

    def after_epoch(self, epoch: int) -> None:
        """An epoch of training is over."""

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The average stands in the model; afterwards the weights that learn stand there again."""
        if not self.average:
            yield
            return
        own = {name: tensor.clone() for name, tensor in weights(self.model).items()}
        _copy(self.average, weights(self.model))
        try:
            yield
        finally:
            _copy(own, weights(self.model))

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {"average": self.average, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        own, self.count = weights(self.model), state["count"]
        self.average = {
            name: shard_like(tensor.to(own[name].device), own[name])
            for name, tensor in state["average"].items()
        }

    def _add(self, add: Any) -> None:
        """Takes the weights of now into the average, by a function of torch's `swa_utils`."""
        now = weights(self.model)
        if not self.average:
            self.average = {name: tensor.clone() for name, tensor in now.items()}
        else:
            moving = [name for name, tensor in now.items() if tensor.is_floating_point()]
            add([self.average[name] for name in moving], [now[name] for name in moving], self.count)
            _copy({n: t for n, t in now.items() if not t.is_floating_point()}, self.average)
        self.count += 1


class ExponentialMovingAverage(WeightAveraging):
    """The exponential moving average of weights and buffers (Polyak and Juditsky 1992).

    Args:
        model: With the weights that learn.
        decay: The share of the average that each step keeps.
        every_n_steps: Steps of the optimizer from one to the next.
        start_epoch: The first whose weights count; from 1.
    """

    updates_per_step = True

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.999,
        every_n_steps: int = 1,
        start_epoch: int = 1,
    ) -> None:
        super().__init__(model, start_epoch)
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} must be at least 0 and below 1")
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps} must be at least 1")
        self.every_n_steps, self.counted = every_n_steps, 0
        self.add = get_ema_multi_avg_fn(decay)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "counted": self.counted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.counted = state["counted"]

    def update(self, epoch: int, steps: int) -> None:
        due = steps != self.counted and steps % self.every_n_steps == 0
        if due and epoch >= self.start_epoch:
            self.counted = steps
            self._add(self.add)


class StochasticWeightAveraging(WeightAveraging):
    """The mean of the weights at the end of each epoch (Izmailov et al. 2018, algorithm 1).

    Statistics of batch normalisation are measured anew on the training data whenever the average
    is used, which costs a forward pass over them.

    Args:
        model: With the weights that learn.
        start_epoch: The first whose weights count; from 1.
    """

    needs_bn_update = True

    def __init__(self, model: nn.Module, start_epoch: int) -> None:
        super().__init__(model, start_epoch)
        self.add = get_swa_multi_avg_fn()

    def after_epoch(self, epoch: int) -> None:
        if epoch >= self.start_epoch:
            self._add(self.add)


@contextmanager
def recompute_bn_stats(model: nn.Module) -> Iterator[list[nn.Module]]:
    """The modules of batch normalisation that learn take the mean over all batches put through.

    Those that are frozen keep their statistics; all else stays in its mode.
    """
    kind = torch.nn.modules.batchnorm._BatchNorm
    found = [
        module
        for module in model.modules()
        if isinstance(module, kind)
        and module.track_running_stats
        and any(parameter.requires_grad for parameter in module.parameters())
    ]
    momenta = [module.momentum for module in found]
    for module in found:
        module.reset_running_stats()
        module.momentum = None  # each batch counts as much as any other
        module.train()
    try:
        yield list(found)
    finally:
        for module, momentum in zip(found, momenta, strict=True):
            module.momentum = momentum
            module.eval()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """All that a state dict of the model holds, by name, to be changed in place."""
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for name, tensor in source.items():
        target[name].copy_(tensor)
