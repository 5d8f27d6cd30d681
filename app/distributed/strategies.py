"""How several ranks learn as one: who calls the model, and where gradients come together.

Each rank gives the gradients of its samples' losses, weighted by how many they are of all; the sum
over ranks is then the gradient of the mean over all samples, whatever their shares.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from app.distributed.collectives import all_reduce, broadcast_tensors, world_size
from app.distributed.sync_batchnorm import SyncBatchNorm
from app.runtime.errors import UserError


class SingleDevice:
    """One rank: the model as it is, gradients as they are.

    Args:
        model: That is trained.

    Attributes:
        is_distributed: Whether gradients of several ranks come together.
        is_padding: Whether the current batch is padding on this rank and does not count.
    """

    is_distributed = False
    grad_divisor = 1  # by which the way of summing divides

    def __init__(self, model: nn.Module) -> None:
        self.model, self.is_padding = model, False
        self.batchnorms = [
            module for module in model.modules() if isinstance(module, SyncBatchNorm)
        ]
        broadcast_tensors([*model.parameters(), *model.buffers()])

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """The model, as a step of training calls it."""
        return self.model(*inputs, **named)

    def on_epoch_start(self) -> None:
        """An epoch of training begins; other parameters may learn than before."""

    def on_epoch_end(self) -> None:
        """It is over; buffers that ranks have changed apart are those of rank 0 again."""
        broadcast_tensors(list(self.model.buffers()))

    @contextmanager
    def sync_context(self, is_padding: bool, steps_next: bool) -> Iterator[None]:  # noqa: ARG002
        """A batch is learned from.

        Args:
            is_padding: This rank has no sample of it.
            steps_next: Gradients are used after it, not kept for the batches to come.
        """
        self.is_padding = is_padding
        for norm in self.batchnorms:
            norm.is_active = not is_padding
        yield
        self.is_padding = False

    def all_reduce_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Those of all ranks, put in place of this rank's."""

    def zero_grad(self, parameters: Iterable[Tensor]) -> None:
        """They have been used."""
        for parameter in parameters:
            parameter.grad = None


class DDPStrategy(SingleDevice):
    """Every rank has the whole model; torch's `DistributedDataParallel` sums gradients.

    It does so while they are still being computed, for the parameters that took part in the first
    step; what a task does beside the model, or without calling it as a whole, is summed when
    gradients are used.

    Args:
        model: That is trained.
        device: That it is on.
        single: A single optimizer has all its parameters.
        find_unused: Other parameters take part from step to step.
    """

    is_distributed = True

    def __init__(
        self, model: nn.Module, device: torch.device, single: bool, find_unused: bool
    ) -> None:
        super().__init__(model)
        self.device, self.single, self.find_unused = device, single, find_unused
        self.ddp: DistributedDataParallel | None = None
        self.reduced: set[Tensor] = set()  # by DDP, since gradients were last used
        self.trainable: list[Tensor] = []
        self.calls = 0
        self.ddp_reduces = False  # whether DDP is to sum in the step under way
        self.ddp_parameters: set[Tensor] = set()  # parameters that DDP sums

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        self.calls += 1
        return (self.ddp or self.model)(*inputs, **named)

    def on_epoch_start(self) -> None:
        learning: list[Tensor] = [p for p in self.model.parameters() if p.requires_grad]
        if [*map(id, learning)] != [*map(id, self.trainable)]:
            self.trainable, self.ddp = learning, None
            super().zero_grad(self.model.parameters())  # zeros would move what is frozen

    @contextmanager
    def sync_context(self, is_padding: bool, steps_next: bool) -> Iterator[None]:
        with ExitStack() as stack:
            if self.ddp is not None and not steps_next:
                stack.enter_context(self.ddp.no_sync())
            stack.enter_context(super().sync_context(is_padding, steps_next))
            self.ddp_reduces = self.ddp is not None and steps_next
            yield
            self.ddp_reduces = False

    def all_reduce_gradients(self, parameters: Iterable[Tensor]) -> None:
        every = [p for p in parameters if p.requires_grad]
        if (
            self.ddp_reduces
            and self.calls
            and not self.find_unused
            and not self.ddp_parameters <= self.reduced
        ):
            raise UserError(  # before any rank waits for what never comes
                "trainer.find_unused_parameters=False, but not all parameters take part in every "
                "step; allowed: true"
            )
        rest = [p for p in every if p not in self.reduced]
        used = _used_anywhere(rest)
        _all_reduce_grads(used)
        if self.ddp is None and self.single and self.calls:
            self._wrap({*used, *self.reduced})
        self.calls = 0

    def zero_grad(self, parameters: Iterable[Tensor]) -> None:
        """Those that are views into DDP's buckets stay there, as zeros, if all are used always."""
        kept = set() if self.find_unused else self.reduced
        every = list(parameters)
        views = [p.grad for p in every if p in kept and p.grad is not None]
        if views:
            torch._foreach_zero_(views)
        super().zero_grad(p for p in every if p not in kept)
        self.reduced = set()

    def _wrap(self, used: set[Tensor]) -> None:
        """Gives the parameters that take part to DDP."""
        self.ddp_parameters = used & {*self.trainable}
        idle = [p for p in self.trainable if p not in used]
        for parameter in idle:
            parameter.requires_grad_(False)  # DDP leaves them alone
        try:
            self.ddp = DistributedDataParallel(
                self.model,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                find_unused_parameters=self.find_unused,
                gradient_as_bucket_view=True,
                **_no_buffers(),  # type: ignore[arg-type]
            )
        finally:
            for parameter in idle:
                parameter.requires_grad_(True)

        def sum_bucket(state, bucket):  # type: ignore[no-untyped-def] # noqa: ARG001
            self.reduced |= {*bucket.parameters()}
            work = dist.all_reduce(bucket.buffer(), async_op=True)
            return work.get_future().then(lambda future: future.value()[0])

        self.ddp.register_comm_hook(None, sum_bucket)


def _no_buffers() -> dict[str, bool]:
    """Running statistics are brought together when an epoch ends; the option's name has changed."""
    names = inspect.signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    return {name: False}


def _used_anywhere(parameters: list[Tensor]) -> list[Tensor]:
    """Those that have a gradient in some rank; where they have none here it becomes zeros."""
    if not parameters:
        return []
    mask = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32)
    used = [p for p, n in zip(parameters, all_reduce(mask).tolist(), strict=True) if n]
    for parameter in used:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return used


def _all_reduce_grads(parameters: list[Tensor]) -> None:
    """Their gradients over all ranks, in one collective for each type."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        same = [gradient for gradient in gradients if gradient.dtype == dtype]
        flat = all_reduce(torch.cat([gradient.reshape(-1) for gradient in same]))
        parts = flat.split([gradient.numel() for gradient in same])
        views = [part.view(g.shape) for part, g in zip(parts, same, strict=True)]
        torch._foreach_copy_(same, views)


class FSDPStrategy(SingleDevice):
    """Every rank has a part of each weight (FSDP2); gradients come together in each backward.

    Each module inside a `Sequential` or `ModuleList` is a unit that is put together as it is used;
    the rest of the model is another.

    Args:
        model: That is trained; its parameters become distributed tensors.
    """

    is_distributed = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.grad_divisor = world_size()
        for module in reversed(list(model.modules())):  # the innermost first
            if isinstance(module, (nn.Sequential, nn.ModuleList)):
                for unit in module:
                    if any(True for _ in unit.parameters()):
                        fully_shard(unit)
        fully_shard(model)

    def all_reduce_gradients(self, parameters: Iterable[Tensor]) -> None:
        beside = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
        used = _used_anywhere(beside)
        _all_reduce_grads(used)
        for parameter in used:  # they have not been divided
            assert parameter.grad is not None
            parameter.grad /= self.grad_divisor


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor that ranks have parts of; every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def split_dtensors(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Those that ranks have parts of, and the others."""
    parts: list[Tensor] = [tensor for tensor in tensors if isinstance(tensor, DTensor)]
    others = [tensor for tensor in tensors if not isinstance(tensor, DTensor)]
    return [same for same in (others, parts) if same]


def total_norm(tensors: list[Tensor]) -> Tensor:
    """The norm of all of them together, over all ranks' parts."""
    dense = [t.coalesce().values() if t.is_sparse else t for t in tensors]
    norms = [full_tensor(torch.nn.utils.get_total_norm(same)) for same in split_dtensors(dense)]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def finite_indicator(tensors: list[Tensor]) -> Tensor:
    """A scalar that is finite where all of them are; cheaper than `total_norm`."""
    kinds = {(type(t), t.layout, t.dtype, t.device) for t in tensors}
    (kind, layout, *_), *others = kinds
    if others or kind is not Tensor or layout is not torch.strided:
        return total_norm(tensors)
    return torch.stack(torch._foreach_norm(tensors)).sum()


def shard_like(value: Any, like: Tensor) -> Any:
    """This rank's part of a whole tensor, as it has one of another; all else stays."""
    is_part = isinstance(like, DTensor) and isinstance(value, Tensor) and value.shape == like.shape
    if not is_part:
        return value
    assert isinstance(like, DTensor)
    given = value.to(like.device, value.dtype)
    return distribute_tensor(given, like.device_mesh, like.placements)


@torch.no_grad()
def load_full_state_dict(state: Mapping[str, Tensor], model: nn.Module) -> None:
    """A whole state dict into a model, each rank taking its part."""
    for name, tensor in model.state_dict().items():
        tensor.copy_(shard_like(state[name], tensor))
