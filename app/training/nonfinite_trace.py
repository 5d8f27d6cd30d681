"""Where a number that is none comes from: a step of training gone through again, to no effect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from app.data.batch import Batch
from app.distributed.collectives import broadcast_object, gather_object, rank
from app.distributed.strategies import SingleDevice
from app.runtime.nested import Nested, tensors
from app.runtime.seed import rng_state, set_rng_state
from app.training.task import Task

LOSS, GRADIENT = "loss", "gradient"


@dataclass(frozen=True)
class NonFiniteSource:
    """Where it comes from.

    Attributes:
        place: Of the batch among those of the step, from 0.
        rank: Whose part of the batch it is.
        kind: `loss` or `gradient`: what is no number first.
        where: The first module whose output is none, or what else it is.
    """

    batch_index: int
    rank: int
    kind: str
    where: str


def trace(task: Task, batches: Sequence[tuple[Batch, bool]]) -> NonFiniteSource | None:
    """Goes through the batches of a step again; every rank must ask, and all get the same.

    Weights, statistics of batches, metrics and randomness are as they were afterwards. Chance, as
    in dropout, is drawn anew; None where nothing is found this time.

    Args:
        task: Its weights must be those of before the step.
        batches: Each with whether it was only lent to this rank.
    """
    with _to_no_effect(task):
        found = [_looked_into(task, batch, lent) for batch, lent in batches]
    mine = [
        (place, rank(), *one)
        for place, ((_, lent), one) in enumerate(zip(batches, found, strict=True))
        if one is not None and not lent
    ]
    first = broadcast_object(
        min((one for part in gather_object(mine) for one in part), default=None)
    )
    return None if first is None else NonFiniteSource(*first)


@contextmanager
def _to_no_effect(task: Task) -> Iterator[None]:
    model, trained, random = task.model, task.forward_model, rng_state()
    compiled, model._compiled_call_impl = model._compiled_call_impl, None
    buffers = clone_all(batchnorm_buffers(model))
    task.forward_model = model
    try:
        yield
    finally:
        task.forward_model, model._compiled_call_impl = trained, compiled
        copy_into(batchnorm_buffers(model), buffers)
        set_rng_state(random)


def _looked_into(task: Task, batch: Batch, lent: bool) -> tuple[str, str] | None:
    """What is no number, and where it comes from; None where all is well."""
    assert task.optimizers is not None
    guard, parallel = (
        task.optimizers.finite_check,
        next(iter(task.optimizers.wrappers.values())).strategy,
    )
    assert guard is not None
    bad: list[tuple[str, str]] = []
    modules: list[str] = []

    def look(learning: list[Tensor], loss: Tensor) -> None:
        if not is_finite(loss):
            bad.append((LOSS, "the loss"))
        elif loss.requires_grad and not any(isinstance(p, DTensor) for p in learning):
            gradients = torch.autograd.grad(loss, learning, allow_unused=True, retain_graph=True)
            pairs = zip(learning, gradients, strict=True)
            names = _names(task.parameters())
            wrong = [names[p] for p, g in pairs if g is not None and not is_finite(g)]
            bad.extend([(GRADIENT, f"the gradient of {wrong[-1]!r}")] if wrong else [])

    guard.trace_hook = look
    try:
        with ExitStack() as stack:
            stack.enter_context(SingleDevice.sync_context(parallel, lent, False))
            stack.enter_context(task.metrics["train"].paused())
            stack.enter_context(task.precision.autocast())
            stack.enter_context(_heard(task.model, modules))
            task.train_step(batch)
    finally:
        guard.trace_hook = None
    if not bad:
        return None
    kind, end = bad[0]
    return kind, _given(task, batch) or (f"module {modules[0]!r}" if modules else end)


def _given(task: Task, batch: Batch) -> str | None:
    """What was no number before the model did anything."""
    if not is_finite(batch):
        return "the batch itself"
    names = (name for name, p in task.parameters().items() if not is_finite(p))
    name = next(names, None)
    return None if name is None else f"the parameter {name!r}"


@contextmanager
def _heard(model: nn.Module, found: list[str]) -> Iterator[None]:
    """Gets the names of modules whose outputs are no numbers, in the order they are called in."""

    def listen(name: str) -> Any:
        def hear(module: nn.Module, inputs: Any, outputs: Nested) -> None:  # noqa: ARG001
            if not is_finite(outputs):
                found.append(name or type(model).__name__)

        return hear

    handles = [m.register_forward_hook(listen(name)) for name, m in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _names(parameters: Mapping[str, Tensor]) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in parameters.items()}


def is_finite(nested: Nested) -> bool:
    """Whether all that is in the tensors are numbers; this reads the device."""
    parts = (t.to_local() if isinstance(t, DTensor) else t for t in tensors(nested))
    return all(bool(torch.isfinite(part).all()) for part in parts if part.is_floating_point())


def batchnorm_buffers(model: nn.Module) -> list[Tensor]:
    """The statistics that a batch leaves behind in going through."""
    kind = torch.nn.modules.batchnorm._NormBase
    norms = (module for module in model.modules() if isinstance(module, kind))
    return [buffer for module in norms for buffer in module.buffers(recurse=False)]


def clone_all(buffers: list[Tensor]) -> list[Tensor]:
    """Their values of now."""
    copies = [torch.empty_like(buffer) for buffer in buffers]
    copy_into(copies, buffers)
    return copies


@torch.no_grad()
def copy_into(buffers: list[Tensor], values: list[Tensor]) -> None:
    """In place."""
    if buffers:
        torch._foreach_copy_(buffers, values)
