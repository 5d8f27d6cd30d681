"""Strategies for one or several ranks: they call the model and reduce the gradients.

Each rank weights the gradients of its loss by its share of the samples in the global batch. The sum
over the ranks is then the gradient of the mean over all samples, even if the shares differ.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
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
    """Trains a model on a single rank.

    Attributes:
        is_distributed: Whether gradients are reduced over several ranks.
        grad_divisor: What the reduction divides gradients by; 1 for a sum.
        is_padding: Whether the current batch is padding on this rank and does not count.
    """

    is_distributed = False
    grad_divisor = 1

    def __init__(self, model: nn.Module) -> None:
        self.model, self.is_padding = model, False
        self.batchnorms = [
            module for module in model.modules() if isinstance(module, SyncBatchNorm)
        ]
        broadcast_tensors([*model.parameters(), *model.buffers()])

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Run the forward pass of a training step."""
        return self.model(*inputs, **named)

    def on_epoch_start(self) -> None:
        """Prepare for an epoch, whose trainable parameters may differ from the last one."""

    def on_epoch_end(self) -> None:
        """Reset the buffers, which ranks have updated separately, to those of rank 0."""
        broadcast_tensors(list(self.model.buffers()))

    @contextmanager
    def sync_context(self, is_padding: bool, steps_next: bool) -> Iterator[None]:  # noqa: ARG002
        """Wrap the forward and backward pass of a batch.

        Args:
            is_padding: This rank has no samples in the batch.
            steps_next: The optimizer steps after this batch, instead of accumulating gradients.
        """
        self.is_padding = is_padding
        for norm in self.batchnorms:
            norm.is_active = not is_padding
        yield
        self.is_padding = False

    def all_reduce_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace the gradients by their sums over all ranks."""

    def zero_grad(self, parameters: Iterable[Tensor]) -> None:
        """Clear the gradients after the optimizer step."""
        for parameter in parameters:
            parameter.grad = None


class DDPStrategy(SingleDevice):
    """Replicates the model on every rank; torch's `DistributedDataParallel` (DDP) sums gradients.

    DDP reduces gradients during the backward pass, for the parameters that were used in the first
    step. All other gradients, including those of a task that does not call the model as a whole,
    are reduced before the optimizer step.

    Args:
        model: The model to train.
        device: Device of the model.
        single_optimizer: One optimizer has all parameters of the model.
        find_unused_parameters: The set of used parameters changes from step to step.
    """

    is_distributed = True

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        single_optimizer: bool,
        find_unused_parameters: bool,
    ) -> None:
        super().__init__(model)
        self.device, self.single_optimizer = device, single_optimizer
        self.find_unused_parameters = find_unused_parameters
        self.ddp: DistributedDataParallel | None = None
        self.reduced: set[Tensor] = set()  # parameters that DDP has reduced since the last step
        self.trainable: list[Tensor] = []
        self.num_forwards = 0  # since the last step
        self.ddp_reduces = False  # whether DDP reduces gradients of the current batch
        self.ddp_parameters: set[Tensor] = set()  # parameters that DDP reduces

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        self.num_forwards += 1
        return (self.ddp or self.model)(*inputs, **named)

    def on_epoch_start(self) -> None:
        trainable: list[Tensor] = [p for p in self.model.parameters() if p.requires_grad]
        if [*map(id, trainable)] != [*map(id, self.trainable)]:
            self.trainable, self.ddp = trainable, None
            # Not to zeros, with which weight decay or momentum would still change frozen parameters
            super().zero_grad(self.model.parameters())

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
        trainable = [p for p in parameters if p.requires_grad]
        if (
            self.ddp_reduces
            and self.num_forwards
            and not self.find_unused_parameters
            and not self.ddp_parameters <= self.reduced
        ):
            raise UserError(  # before any rank waits for a reduction that never starts
                "trainer.find_unused_parameters=False, but not all parameters are used in every "
                "step; allowed: true"
            )
        rest = [p for p in trainable if p not in self.reduced]
        used = _used_anywhere(rest)
        _all_reduce_grads(used)
        if self.ddp is None and self.single_optimizer and self.num_forwards:
            self._wrap_in_ddp({*used, *self.reduced})
        self.num_forwards = 0

    def zero_grad(self, parameters: Iterable[Tensor]) -> None:
        """Clear the gradients; set views into DDP's buckets to zero, to keep the views.

        With `find_unused_parameters`, an unused parameter must have no gradient instead.
        """
        views_kept = set() if self.find_unused_parameters else self.reduced
        parameters = list(parameters)
        views = [p.grad for p in parameters if p in views_kept and p.grad is not None]
        if views:
            torch._foreach_zero_(views)
        super().zero_grad(p for p in parameters if p not in views_kept)
        self.reduced = set()

    def _wrap_in_ddp(self, used: set[Tensor]) -> None:
        """Wrap the model in DDP for the parameters that were used in the first step."""
        self.ddp_parameters = used & {*self.trainable}
        unused = [p for p in self.trainable if p not in used]
        for parameter in unused:
            parameter.requires_grad_(False)  # so that DDP ignores them
        try:
            self.ddp = DistributedDataParallel(
                self.model,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                find_unused_parameters=self.find_unused_parameters,
                gradient_as_bucket_view=True,
                **_no_buffer_sync(),  # type: ignore[arg-type]
            )
        finally:
            for parameter in unused:
                parameter.requires_grad_(True)

        def sum_bucket(state, bucket):  # type: ignore[no-untyped-def] # noqa: ARG001
            self.reduced |= {*bucket.parameters()}
            work = dist.all_reduce(bucket.buffer(), async_op=True)
            return work.get_future().then(lambda future: future.value()[0])

        self.ddp.register_comm_hook(None, sum_bucket)


def _no_buffer_sync() -> dict[str, bool]:
    """Return the DDP option against buffer synchronization; its name depends on torch's version.

    `on_epoch_end` synchronizes the buffers.
    """
    names = inspect.signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    return {name: False}


def _used_anywhere(parameters: list[Tensor]) -> list[Tensor]:
    """Return the parameters with a gradient on any rank; fill in zeros where this rank has none."""
    if not parameters:
        return []
    mask = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32)
    counts = all_reduce(mask).tolist()
    used = [p for p, count in zip(parameters, counts, strict=True) if count]
    for parameter in used:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return used


def _all_reduce_grads(parameters: list[Tensor]) -> None:
    """Sum the gradients over all ranks, with one collective per dtype."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        same = [gradient for gradient in gradients if gradient.dtype == dtype]
        flat = all_reduce(torch.cat([gradient.reshape(-1) for gradient in same]))
        chunks = flat.split([gradient.numel() for gradient in same])
        sums = [chunk.view(g.shape) for chunk, g in zip(chunks, same, strict=True)]
        torch._foreach_copy_(same, sums)


class FSDPStrategy(SingleDevice):
    """Shards each parameter over the ranks (FSDP2); gradients are reduced in the backward pass.

    Each child of a `Sequential` or `ModuleList` is sharded as a unit, which is gathered when it is
    used; the rest of the model is another unit.

    Args:
        model: The model to train; its parameters become `DTensor`s.
    """

    is_distributed = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.grad_divisor = world_size()
        for module in reversed(list(model.modules())):  # innermost modules first
            if isinstance(module, (nn.Sequential, nn.ModuleList)):
                for unit in module:
                    if any(True for _ in unit.parameters()):
                        fully_shard(unit)
        fully_shard(model)

    def all_reduce_gradients(self, parameters: Iterable[Tensor]) -> None:
        unsharded = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
        used = _used_anywhere(unsharded)
        _all_reduce_grads(used)
        for parameter in used:  # FSDP divides only the gradients of sharded parameters
            assert parameter.grad is not None
            parameter.grad /= self.grad_divisor


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor; return any other tensor as is. Every rank must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a sharded tensor; return any other tensor as is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def split_dtensors(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Split tensors into regular and sharded ones; empty groups are left out."""
    sharded: list[Tensor] = [tensor for tensor in tensors if isinstance(tensor, DTensor)]
    regular = [tensor for tensor in tensors if not isinstance(tensor, DTensor)]
    return [group for group in (regular, sharded) if group]


def total_norm(tensors: list[Tensor]) -> Tensor:
    """Return the 2-norm of all tensors together, over the shards of all ranks."""
    if are_alike(tensors):  # as `get_total_norm` does, with fewer calls
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))
        return norm
    dense = [t.coalesce().values() if t.is_sparse else t for t in tensors]
    norms = [full_tensor(torch.nn.utils.get_total_norm(group)) for group in split_dtensors(dense)]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def nonfinite_indicator(tensors: list[Tensor]) -> Tensor:
    """Return a scalar that is 0 if all tensors are finite, over the shards of all ranks.

    This is cheaper than `total_norm`, and exact where the norm of large values overflows.
    """
    if not are_alike(tensors) or tensors[0].device.type not in ("cpu", "cuda"):
        return total_norm(tensors) * 0
    found_inf = torch.zeros((), device=tensors[0].device)
    # As in `GradScaler`; the scale of 1 changes nothing.
    torch._amp_foreach_non_finite_check_and_unscale_(tensors, found_inf, _one(found_inf.device))
    return found_inf


@cache
def _one(device: torch.device) -> Tensor:
    return torch.ones((), device=device)


def are_alike(tensors: list[Tensor]) -> bool:
    """Return whether all are regular, dense and real, with the same data type and device."""
    kinds = {(type(t), t.layout, t.dtype, t.device) for t in tensors}
    (kind, layout, dtype, _), *others = kinds
    is_regular = kind is Tensor and layout is torch.strided and dtype.is_floating_point
    return is_regular and not others


def shard_like(value: Any, like: Tensor) -> Any:
    """Return a full tensor of the shape of `like` with its device, strides and sharding.

    Any other value is returned as is. Fused optimizers on CUDA need state with the strides of the
    parameters, which may be in the channels-last memory format.
    """
    if not isinstance(value, Tensor) or value.shape != like.shape or not like.ndim:
        return value
    if isinstance(like, DTensor):
        tensor = value.to(like.device, value.dtype)
        return distribute_tensor(tensor, like.device_mesh, like.placements)
    return torch.empty_like(like, dtype=value.dtype, requires_grad=False).copy_(value)


@torch.no_grad()
def load_full_state_dict(state: Mapping[str, Tensor], model: nn.Module) -> None:
    """Load an unsharded state dict into a model, of which each rank takes its shards."""
    for name, tensor in model.state_dict().items():
        tensor.copy_(shard_like(state[name], tensor))
