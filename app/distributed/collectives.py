"""Collective operations over all ranks; in a single process, each one is the identity."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
SYNC_SECONDS = 0.2  # approximate time between two reductions of a `LazyAllReduceMax`


def is_distributed() -> bool:
    """Whether this process belongs to a process group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return the rank of this process; 0 in a single process."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Return the number of ranks; 1 in a single process."""
    return dist.get_world_size() if is_distributed() else 1


def local_slice(count: int) -> slice:
    """Return this rank's contiguous share of `count` samples, which may be empty.

    Shares are in the order of the ranks, and their sizes differ by at most one.
    """
    index = rank()
    size, remainder = divmod(count, world_size())
    start = index * size + min(index, remainder)
    return slice(start, start + size + (index < remainder))


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_async(number: float) -> Callable[[], float]:
    """Start to sum a number over all ranks; return a function that waits for the total."""
    if not is_distributed():
        return lambda: number
    total = all_reduce_tensor_async(torch.tensor([number], dtype=torch.float64))
    return lambda: total().item()


def all_reduce_tensor_async(tensor: Tensor) -> Callable[[], Tensor]:
    """Start to sum a tensor over all ranks, in place; return a function that waits for it."""
    work = dist.all_reduce(tensor, async_op=True) if is_distributed() else None

    def total() -> Tensor:
        if work is not None:
            work.wait()
        return tensor

    return total


def broadcast_object(value: T) -> T:
    """Return the value of rank 0 on every rank."""
    if not is_distributed():
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]  # type: ignore[no-any-return]


def gather_object(value: T) -> list[T]:
    """Return the values of all ranks on rank 0, and an empty list on the others.

    Tensors in the value must be on the CPU.
    """
    if not is_distributed():
        return [value]
    values: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Run the body on rank 0 first and then on all other ranks, e.g. to download only once."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and is_distributed():
        dist.barrier()


def broadcast_tensors(tensors: list[Tensor]) -> None:
    """Overwrite the tensors of every rank with the values of rank 0."""
    if is_distributed():
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)


class LazyAllReduceMax:
    """Maximum of a number over all ranks, with a delay, so that no rank waits for it.

    All ranks must call it equally often, for example once per step. Because a reduction costs as
    much as a very small step, only some of the calls start one, about `1 / SYNC_SECONDS` per
    second.
    """

    def __init__(self) -> None:
        self.pending: tuple[dist.Work, Tensor] | None = None
        self.last_reduce_at = time.monotonic()
        self.calls_since_reduce, self.calls_per_reduce = 0, 1

    def __call__(self, value: int) -> int:
        """Return the maximum of the previous reduction, or 0; in a single process, `value`."""
        if not is_distributed():
            return value
        self.calls_since_reduce += 1
        if self.calls_since_reduce < self.calls_per_reduce:
            return 0
        previous = self._finish_reduce()
        self._start_reduce(value)
        return previous

    def wait(self, value: int) -> int:
        """Return the maximum of the pending reduction and of a new one, and wait for both."""
        if not is_distributed():
            return value
        previous = self._finish_reduce()
        self._start_reduce(value)
        maximum = max(previous, self._finish_reduce())
        self.calls_per_reduce = 1  # the steps of the next stage may be longer
        return maximum

    def _start_reduce(self, value: int) -> None:
        elapsed = time.monotonic() - self.last_reduce_at
        seconds_per_call = elapsed / max(1, self.calls_since_reduce)
        tensor = torch.tensor([float(value), seconds_per_call], dtype=torch.float64)
        work = dist.all_reduce(tensor, dist.ReduceOp.MAX, async_op=True)
        self.pending = work, tensor
        self.last_reduce_at, self.calls_since_reduce = time.monotonic(), 0

    def _finish_reduce(self) -> int:
        if self.pending is None:
            return 0
        (work, tensor), self.pending = self.pending, None
        work.wait()
        maximum, seconds_per_call = tensor.tolist()
        calls = int(SYNC_SECONDS / max(seconds_per_call, 1e-6))
        self.calls_per_reduce = max(1, min(1000, calls))
        return int(maximum)
