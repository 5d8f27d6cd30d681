"""Several ranks as one: each function is the identity when alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

T = TypeVar("T")
SYNC_SECONDS = 0.2  # seconds, about, from one agreement to the next


def is_distributed() -> bool:
    """Whether several processes run as one."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """The number of this process among those that train together; 0 when alone."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if is_distributed() else 1


def local_slice(count: int) -> slice:
    """Which of so many samples are this rank's: neighbours, ranks in order, some perhaps empty."""
    mine = rank()
    few, more = divmod(count, world_size())
    start = mine * few + min(mine, more)
    return slice(start, start + few + (mine < more))


def all_reduce(block: Tensor) -> Tensor:
    """The sum of every rank's tensor, on every rank; changes the tensor given."""
    if is_distributed():
        dist.all_reduce(block)
    return block


def all_reduce_async(number: float) -> Callable[[], float]:
    """Begins to add up every rank's number; the function given waits for the total."""
    if not is_distributed():
        return lambda: number
    tensor = torch.tensor([number], dtype=torch.float64)
    work = dist.all_reduce(tensor, async_op=True)

    def total() -> float:
        work.wait()
        return tensor.item()

    return total


def broadcast_object(value: T) -> T:
    """Rank 0's value, on every rank; those of the others are lost."""
    if not is_distributed():
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]  # type: ignore[no-any-return]


def gather_object(value: T) -> list[T]:
    """Every rank's value, in rank 0; in the others nothing. Tensors must be on the host."""
    if not is_distributed():
        return [value]
    found: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, found)
    return found or []


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Rank 0 goes through it alone, then all others: a download happens once."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and is_distributed():
        dist.barrier()


def broadcast_tensors(tensors: list[Tensor]) -> None:
    """Rank 0's values, put into every rank's tensors."""
    if is_distributed():
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)


class AllReduceSum(torch.autograd.Function):
    """The sum of every rank's tensor, through which gradients find their way."""

    @staticmethod
    def forward(ctx: FunctionCtx, tensor: Tensor) -> Tensor:  # noqa: ARG004
        return all_reduce(tensor.clone())

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:  # noqa: ARG004
        return all_reduce(gradient.clone())


class LazyAllReduceMax:
    """The largest of all ranks' numbers, told late, so that nobody waits for it.

    Ranks ask at every step and all make the same steps; they tell each other but some times a
    second, however short a step is, since each time costs as much as a very small step.
    """

    def __init__(self) -> None:
        self.pending: tuple[dist.Work, Tensor] | None = None
        self.began, self.calls, self.every = time.monotonic(), 0, 1

    def __call__(self, mine: int) -> int:
        """What all ranks said when they last told; when alone, `mine`."""
        if not is_distributed():
            return mine
        self.calls += 1
        if self.calls < self.every:
            return 0
        before = self._finish_reduce()
        self._start_reduce(mine)
        return before

    def wait(self, mine: int) -> int:
        """What all ranks say now, and have not heard yet; for once it is waited for."""
        if not is_distributed():
            return mine
        before = self._finish_reduce()
        self._start_reduce(mine)
        found = max(before, self._finish_reduce())
        self.every = 1  # steps of the next stage may be long
        return found

    def _start_reduce(self, mine: int) -> None:
        seconds = (time.monotonic() - self.began) / max(1, self.calls)
        tensor = torch.tensor([float(mine), seconds], dtype=torch.float64)
        work = dist.all_reduce(tensor, dist.ReduceOp.MAX, async_op=True)
        self.pending = work, tensor
        self.began, self.calls = time.monotonic(), 0

    def _finish_reduce(self) -> int:
        if self.pending is None:
            return 0
        (work, tensor), self.pending = self.pending, None
        work.wait()
        reason, seconds = tensor.tolist()
        self.every = max(1, min(1000, int(SYNC_SECONDS / max(seconds, 1e-6))))
        return int(reason)
