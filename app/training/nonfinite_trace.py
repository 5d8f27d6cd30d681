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
from app.training.optim.optim_wrapper import OptimWrapper, OptimWrapperDict
from app.training.rank_sync import StepBatch
from app.training.task import Task

Place = tuple[str, str]  # `loss` or `gradient`, and the module, parameter or gradient


def trace(task: Task, batches: Sequence[StepBatch]) -> tuple[int, int, str, str] | None:
    """Run the batches of a step again to find out where a NaN or infinity comes from.

    All ranks must call this, and all get the same result. Afterwards the weights, batch norm
    statistics, metrics and random number generators are as before. Random operations such as
    dropout draw other numbers than in the original step.

    Args:
        task: Task whose weights are those from before the step.
        batches: Batches of the step.

    Returns:
        Number of the first batch that is not finite and its first rank; `loss` or `gradient`,
        whichever was not finite first, and the module, parameter or gradient that it comes from.
        None if everything is finite this time.
    """
    found = []
    for batch in batches:
        with _replay(task) as places:
            _inspect_batch(task, batch, places)
        if places and not batch.is_padding:
            found.append((batch.number, rank(), *places[0]))
    candidates = [item for items in gather_object(found) for item in items]
    return broadcast_object(min(candidates, default=None))


@contextmanager
def _replay(task: Task) -> Iterator[list[Place]]:
    """Record places instead of stepping inside the block, and restore all that this changes.

    The plain module is called, not a strategy or a compiled one.
    """
    model, optimizers, random = task.model, task.optimizers, rng_state()
    forward_model, compiled = task.forward_model, model._compiled_call_impl
    assert optimizers is not None
    buffers = [buffer.clone() for buffer in batchnorm_buffers(model)]
    places: list[Place] = []
    probes = {name: LossProbe(w, task, places) for name, w in optimizers.wrappers.items()}
    task.prepare_training(OptimWrapperDict(probes, None), model)
    model._compiled_call_impl = None
    try:
        yield places
    finally:
        task.prepare_training(optimizers, forward_model)
        model._compiled_call_impl = compiled
        copy_into(batchnorm_buffers(model), buffers)
        set_rng_state(random)


class LossProbe(OptimWrapper):
    """Records whether a loss or its gradients are not finite, in place of an optimizer step."""

    def __init__(self, wrapper: OptimWrapper, task: Task, places: list[Place]) -> None:
        super().__init__(wrapper.optimizer, wrapper.schedule, strategy=wrapper.strategy)
        self.task, self.places, self.steps = task, places, wrapper.steps

    def step(self, loss: Tensor, num_samples: int, weight: Tensor | None = None) -> None:  # noqa: ARG002
        if not all_finite(loss):
            self.places.append(("loss", "the loss"))
        elif loss.requires_grad:
            self._inspect_gradients(loss)

    def _inspect_gradients(self, loss: Tensor) -> None:
        """Record the last parameter with such a gradient: the backward pass starts there."""
        trainable = self.trainable
        if not trainable or any(isinstance(parameter, DTensor) for parameter in trainable):
            return  # FSDP would synchronize the gradients
        gradients = torch.autograd.grad(loss, trainable, allow_unused=True, retain_graph=True)
        names: dict[Tensor, str] = {p: name for name, p in self.task.parameters().items()}
        for parameter, gradient in reversed([*zip(trainable, gradients, strict=True)]):
            if gradient is not None and not all_finite(gradient):
                self.places.append(("gradient", f"the gradient of {names[parameter]!r}"))
                return


def _inspect_batch(task: Task, batch: StepBatch, places: list[Place]) -> None:
    """Replay a batch, and let `places` begin with the kind and the earliest place, if any."""
    assert task.optimizers is not None
    strategy = next(iter(task.optimizers.wrappers.values())).strategy
    modules: list[str] = []
    with (
        # Not the strategy's own context: gradients are not synchronized here.
        SingleDevice.sync_context(strategy, batch.is_padding, False),
        task.metrics["train"].paused(),
        task.precision.autocast(),
        _recording_modules(task.model, modules),
    ):
        task.train_step(batch.data)
    if places:
        kind, place = places[0]
        module = f"module {modules[0]!r}" if modules else place
        places[0] = kind, _find_in_inputs(task, batch.data) or module


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


@torch.no_grad()
def copy_into(tensors: list[Tensor], values: list[Tensor]) -> None:
    """Copy the values into the tensors, in place."""
    if tensors:
        torch._foreach_copy_(tensors, values)
