"""Sums over all samples of an optimizer step, through which gradients flow.

The samples may be shared among ranks, and come in several accumulated batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

_is_padding = ContextVar("is_padding", default=False)


@dataclass
class StepSums:
    """Sums over the batches that an optimizer step accumulates.

    A forward pass of each batch, before the first of them is trained on, adds up the totals. In
    training, the loss of each batch then gets the totals, while gradients flow through the sums of
    its own batch; these gradients add up to those of a single large batch.

    Attributes:
        num_samples: Samples of each batch, over all ranks.
        totals: Sums over the batches and ranks, in the order of the calls of `sum_over_step`.
        position: Number of calls of `sum_over_step` for the current batch so far.
        gradient_factor: Factor of the gradients of the current batch; None while totals are added
            up.
    """

    num_samples: list[float] = field(default_factory=list)
    totals: list[Tensor] = field(default_factory=list)
    position: int = 0
    gradient_factor: float | None = None

    @contextmanager
    def add_batch(self) -> Iterator[None]:
        """Add the sums of the next batch to the totals; `finish_batch` is to be called after it."""
        with self._active(None):
            yield

    def finish_batch(self, num_samples: float) -> None:
        """Set the number of samples of the last batch, over all ranks."""
        self.num_samples.append(num_samples)

    @contextmanager
    def use_totals(self, batch: int) -> Iterator[None]:
        """Let `sum_over_step` return the totals while training on a batch, counted from 0."""
        # A batch has the share `num_samples[batch] / sum(num_samples)` of the mean loss.
        with self._active(sum(self.num_samples) / self.num_samples[batch]):
            yield

    @contextmanager
    def _active(self, gradient_factor: float | None) -> Iterator[None]:
        self.position, self.gradient_factor = 0, gradient_factor
        token = _step_sums.set(self)
        try:
            yield
        finally:
            _step_sums.reset(token)

    def total(self, sums: Tensor) -> Tensor:
        """Return the total of the sums that this call of `sum_over_step` has for one batch."""
        number, self.position = self.position, self.position + 1
        if self.gradient_factor is not None:
            return self.totals[number] + (sums - sums.detach()) * self.gradient_factor
        if not self.num_samples:
            self.totals.append(sums.detach())
        else:
            self.totals[number] = self.totals[number] + sums.detach()
        return sums


_step_sums: ContextVar[StepSums | None] = ContextVar("step_sums", default=None)


class AllReduceSum(torch.autograd.Function):
    """Differentiable sum of a tensor over all ranks."""

    @staticmethod
    def forward(ctx: FunctionCtx, tensor: Tensor) -> Tensor:  # noqa: ARG004
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:  # noqa: ARG004
        total = gradient.clone()
        dist.all_reduce(total)
        return total


@contextmanager
def padding() -> Iterator[None]:
    """Leave this rank's samples out of `sum_over_step`, since its batch is padding."""
    token = _is_padding.set(True)
    try:
        yield
    finally:
        _is_padding.reset(token)


def sum_over_step(sums: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks and accumulated batches of an optimizer step.

    A loss that is not a mean over samples, such as the overlap of a whole batch, calls it with
    the sums of its own samples. With one rank and one batch it returns the tensor itself.
    """
    if _has_ranks():
        sums = AllReduceSum.apply(sums * (not _is_padding.get()))
    step_sums = _step_sums.get()
    return sums if step_sums is None else step_sums.total(sums)


def share_of_mean(mean: Tensor, divisor: Tensor, num_samples: int) -> Tensor:
    """Scale the mean over one part of an optimizer step, for a mean over parts weighted by samples.

    The mean of the results of all ranks and accumulated batches, weighted by their numbers of
    samples, is the mean over all of them. If there is one part the result is the mean itself.

    Args:
        mean: A sum over the part, divided by `divisor`; a scalar.
        divisor: Scalar, such as the number of positions that are not ignored.
        num_samples: Samples of this part.
    """
    if not _has_ranks() and _step_sums.get() is None:
        return mean
    divisor = divisor.detach().float()
    total, count = sum_over_step(torch.stack([divisor, torch.full_like(divisor, num_samples)]))
    share: Tensor = divisor * count / (total.where(total > 0, 1) * num_samples)
    return mean * share


def _has_ranks() -> bool:
    return dist.is_available() and dist.is_initialized()
