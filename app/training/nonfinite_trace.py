"""Tracing of NaN and infinity: runs a training step again, without any lasting effect."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from app.data.batch import Batch
from app.distributed.collectives import broadcast_object, gather_object, rank
from app.distributed.strategies import SingleDevice
from app.runtime.nested import Nested, iter_tensors
from app.runtime.seed import rng_state, set_rng_state
from app.training.nonfinite_event import NonFiniteEvent
from app.training.rank_sync import StepBatch
from app.training.task import Task


def trace(task: Task, epoch: int, batches: Sequence[StepBatch]) -> NonFiniteEvent | None:
    """Run the batches of a step again to find out where a NaN or infinity comes from.

    All ranks must call this, and all get the same result. Afterwards the weights, batch norm
    statistics, metrics and random number generators are as before. Random operations such as
    dropout draw other numbers than in the original step.

    Args:
        task: Task whose weights are those from before the step.
        epoch: Epoch of the step, counted from 1.
        batches: Batches of the step.

    Returns:
        The first event by batch and rank; None if everything is finite this time.
    """
    local = []
    with _state_preserved(task):
        for batch in batches:
            found = _inspect_batch(task, batch)
            if found is not None and not batch.is_padding:
                kind, where = found
                event = NonFiniteEvent("train", epoch, batch.number, None, rank(), kind, where)
                local.append((batch.number, rank(), event))
    candidates = (item for items in gather_object(local) for item in items)
    first = broadcast_object(min(candidates, default=None))
    return None if first is None else first[2]


@contextmanager
def _state_preserved(task: Task) -> Iterator[None]:
    """Call the plain module inside the block, and restore everything that this changes."""
    model, forward_model, random = task.model, task.forward_model, rng_state()
    compiled, model._compiled_call_impl = model._compiled_call_impl, None
    buffers = clone_all(batchnorm_buffers(model))
    task.forward_model = model
    try:
        yield
    finally:
        task.forward_model, model._compiled_call_impl = forward_model, compiled
        copy_into(batchnorm_buffers(model), buffers)
        set_rng_state(random)


def _inspect_batch(task: Task, batch: StepBatch) -> tuple[str, str] | None:
    """Return the kind and the place of what is not finite; None if everything is."""
    assert task.optimizers is not None
    strategy = next(iter(task.optimizers.wrappers.values())).strategy
    places: list[tuple[str, str]] = []
    modules: list[str] = []

    def inspect(trainable: list[Tensor], loss: Tensor) -> None:
        if not all_finite(loss):
            places.append(("loss", "the loss"))
        elif trainable and loss.requires_grad:
            places.extend(_find_in_gradients(task, trainable, loss))

    with (
        task.optimizers.finite_check.tracing(inspect),
        # Not the strategy's own context: gradients are not synchronized here.
        SingleDevice.sync_context(strategy, batch.is_padding, False),
        task.metrics["train"].paused(),
        task.precision.autocast(),
        _recording_modules(task.model, modules),
    ):
        task.train_step(batch.data)
    if not places:
        return None
    kind, place = places[0]
    if modules:
        place = f"module {modules[0]!r}"
    return kind, _find_in_inputs(task, batch.data) or place


def _find_in_gradients(task: Task, trainable: list[Tensor], loss: Tensor) -> list[tuple[str, str]]:
    """Return the last parameter whose gradient is not finite: the backward pass starts there."""
    if any(isinstance(parameter, DTensor) for parameter in trainable):
        return []  # FSDP would synchronize the gradients
    gradients = torch.autograd.grad(loss, trainable, allow_unused=True, retain_graph=True)
    names: dict[Tensor, str] = {p: name for name, p in task.parameters().items()}
    wrong = [
        names[parameter]
        for parameter, gradient in zip(trainable, gradients, strict=True)
        if gradient is not None and not all_finite(gradient)
    ]
    return [("gradient", f"the gradient of {wrong[-1]!r}")] if wrong else []


def _find_in_inputs(task: Task, batch: Batch) -> str | None:
    """Return what was not finite before the model ran: the batch or a parameter."""
    if not all_finite(batch):
        return "the batch itself"
    names = (name for name, p in task.parameters().items() if not all_finite(p))
    name = next(names, None)
    return None if name is None else f"the parameter {name!r}"


@contextmanager
def _recording_modules(model: nn.Module, names: list[str]) -> Iterator[None]:
    """Append the names of modules whose outputs are not finite, in the order of their calls."""

    def record(name: str, module: nn.Module, inputs: Any, outputs: Nested) -> None:  # noqa: ARG001
        if not all_finite(outputs):
            names.append(name or type(module).__name__)

    handles = [m.register_forward_hook(partial(record, name)) for name, m in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def all_finite(nested: Nested) -> bool:
    """Return whether no floating-point tensor has NaN or infinity; this reads the device."""
    parts = (t.to_local() if isinstance(t, DTensor) else t for t in iter_tensors(nested))
    return all(bool(torch.isfinite(part).all()) for part in parts if part.is_floating_point())


def batchnorm_buffers(model: nn.Module) -> list[Tensor]:
    """Return the running statistics of all normalization modules, which a forward pass changes."""
    norm_class = torch.nn.modules.batchnorm._NormBase
    norms = (module for module in model.modules() if isinstance(module, norm_class))
    return [buffer for module in norms for buffer in module.buffers(recurse=False)]


def clone_all(tensors: list[Tensor]) -> list[Tensor]:
    """Return copies of all tensors."""
    copies = [torch.empty_like(tensor) for tensor in tensors]
    copy_into(copies, tensors)
    return copies


@torch.no_grad()
def copy_into(tensors: list[Tensor], values: list[Tensor]) -> None:
    """Copy the values into the tensors, in place."""
    if tensors:
        torch._foreach_copy_(tensors, values)
