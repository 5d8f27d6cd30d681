"""Sums over a batch that several ranks share, through which gradients flow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

_is_padding = ContextVar("is_padding", default=False)


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
    """Leave this rank's samples out of `sum_over_ranks`, since its batch is padding."""
    token = _is_padding.set(True)
    try:
        yield
    finally:
        _is_padding.reset(token)


def sum_over_ranks(sums: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks; in a single process, the tensor itself."""
    if not _has_ranks():
        return sums
    total: Tensor = AllReduceSum.apply(sums * (not _is_padding.get()))
    return total


def share_of_mean(mean: Tensor, divisor: Tensor, num_samples: int) -> Tensor:
    """Scale the mean over this rank's part of a batch, for a mean over ranks weighted by samples.

    The mean of the results of all ranks, weighted by their numbers of samples, is the mean over the
    whole batch. In a single process the result is the mean itself.

    Args:
        mean: A sum over the part of the batch, divided by `divisor`; a scalar.
        divisor: Scalar, such as the number of positions that are not ignored.
        num_samples: Samples of this part.
    """
    if not _has_ranks():
        return mean
    divisor = divisor.detach().float()
    total, count = sum_over_ranks(torch.stack([divisor, torch.full_like(divisor, num_samples)]))
    share: Tensor = divisor * count / (total.where(total > 0, 1) * num_samples)
    return mean * share


def _has_ranks() -> bool:
    return dist.is_available() and dist.is_initialized()
