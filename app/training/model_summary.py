"""Measure a model by module: output shapes, parameters, FLOPs and memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from app.data.batch import BatchLoader
from app.runtime.nested import iter_tensors, pick
from app.runtime.seed import rng_state, set_rng_state
from app.training.supervised import SupervisedTask
from app.training.task import Task

log = logging.getLogger(__name__)
ROOT_NAME = "(model)"
MAX_SHAPES = 3  # of a module with several outputs
# Options that choose an implementation, which parameters without memory do not have.
IMPLEMENTATION_OPTIONS = ("fused", "foreach", "capturable")


@dataclass(frozen=True)
class ModuleRow:
    """A module of a model.

    Attributes:
        name: Name in the model, as in `named_modules`.
        depth: Number of modules that contain it.
        kind: Name of its class.
        output_shape: Shape of its output for one sample; empty if it was not called.
        parameters: Number of parameters in it.
        trainable: How many of them are trained at some time.
        flops: Floating-point operations for one sample, a multiplication and an addition being
            two; None if the model could not be run.
    """

    name: str
    depth: int
    kind: str
    output_shape: str
    parameters: int
    trainable: int
    flops: int | None


@dataclass(frozen=True)
class Summary:
    """A model by module, and the memory that training it needs besides activations.

    Attributes:
        rows: The model itself, and then all modules in it.
        weight_bytes: Memory of parameters and buffers.
        gradient_bytes: Memory of the gradients.
        optimizer_bytes: Memory of the state of the optimizers; None if unknown.
        problem: Why the model could not be run; None if it could.
    """

    rows: list[ModuleRow]
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int | None
    problem: str | None


def summarize_model(
    task: Task,
    loader: BatchLoader,
    trained: Mapping[str, nn.Parameter],
    optimizer_bytes: int | None,
) -> Summary:
    """Measure a model with one sample, in evaluation mode.

    Random generators and modes of modules are as before. A model that cannot be run is measured
    without output shapes and FLOPs.

    Args:
        task: The task with the model.
        loader: Its first sample is used.
        trained: Parameters that are trained at some time, by name.
        optimizer_bytes: Memory of the state of the optimizers.
    """
    calls, problem = _Calls(), None
    try:
        with _undisturbed(task.model), calls.recorded():
            _run(task, loader)
    except Exception as error:  # noqa: BLE001 - of the user's model
        reason = str(error).strip().partition("\n")[0]
        calls, problem = _Calls(), f"{type(error).__name__}: {reason}"
    ids = {id(parameter) for parameter in trained.values()}
    rows = [
        ModuleRow(
            name or ROOT_NAME,
            name.count(".") + 1 if name else 0,
            type(module).__name__,
            calls.shapes.get(module, ""),
            sum(parameter.numel() for parameter in module.parameters()),
            sum(parameter.numel() for parameter in module.parameters() if id(parameter) in ids),
            calls.flops.get(module, 0) if problem is None else None,
        )
        for name, module in task.model.named_modules()
    ]
    weights = [*task.model.parameters(), *task.model.buffers()]
    gradients = count_bytes(trained.values())
    return Summary(rows, count_bytes(weights), gradients, optimizer_bytes, problem)


def _run(task: Task, loader: BatchLoader) -> None:
    batch = loader.first(1)
    with torch.no_grad(), task.precision.autocast(), torch.compiler.set_stance("force_eager"):
        if isinstance(task, SupervisedTask):
            task.forward(pick(batch, task.inputs))  # once, even where `predict` cuts windows
        else:
            task.predict_step(batch)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluate a model inside the `with` block, and leave no trace of it."""
    modes = {module: module.training for module in model.modules()}
    random_state, fast_path = rng_state(), torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it calls no submodules
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        torch.backends.mha.set_fastpath_enabled(fast_path)
        set_rng_state(random_state)


class _Calls:
    """What the modules returned, and what they computed.

    Attributes:
        shapes: Shape of the last output of each module.
        flops: Operations of all calls of each module, including those of the modules in it.
    """

    def __init__(self) -> None:
        self.shapes: dict[nn.Module, str] = {}
        self.flops: dict[nn.Module, int] = {}
        self._starts: list[int] = []  # operations before each call that has not returned

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record all calls of modules inside the `with` block."""
        with ExitStack() as stack:
            counter = stack.enter_context(FlopCounterMode(display=False))

            def before(module: nn.Module, inputs: Any) -> None:  # noqa: ARG001
                self._starts.append(counter.get_total_flops())

            def after(module: nn.Module, inputs: Any, outputs: Any) -> None:  # noqa: ARG001
                flops = counter.get_total_flops() - self._starts.pop()
                self.flops[module] = self.flops.get(module, 0) + flops
                shapes = [str([*tensor.shape]) for tensor in iter_tensors(outputs)]
                more = ", ..." if len(shapes) > MAX_SHAPES else ""
                self.shapes[module] = ", ".join(shapes[:MAX_SHAPES]) + more

            stack.enter_context(register_module_forward_pre_hook(before))
            stack.enter_context(register_module_forward_hook(after))
            yield


def count_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the memory of tensors in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def optimizer_state_bytes(
    make_optimizer: Callable[[list[nn.Parameter]], object], parameters: Iterable[nn.Parameter]
) -> int | None:
    """Return the memory of an optimizer's state for parameters, in bytes.

    The optimizer makes a step with parameters of the same shapes that have no memory, one of each
    shape.

    Returns:
        The memory, or None if the optimizer cannot do that.
    """
    counts: dict[tuple[torch.Size, torch.dtype], int] = {}
    for parameter in parameters:
        kind = (parameter.shape, parameter.dtype)
        counts[kind] = counts.get(kind, 0) + 1
    blank = [
        nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) for shape, dtype in counts
    ]
    for parameter in blank:
        parameter.grad = torch.empty_like(parameter)
    random_state = rng_state()
    try:
        optimizer = make_optimizer(blank)
        assert isinstance(optimizer, Optimizer)
        optimizer.step()
        states = [optimizer.state[parameter] for parameter in blank]
        sizes = [count_bytes(iter_tensors(list(state.values()))) for state in states]
    except Exception:  # of the user's optimizer, or of one that needs values
        log.debug("the memory of the optimizer's state is unknown", exc_info=True)
        return None
    finally:
        set_rng_state(random_state)
    return sum(size * count for size, count in zip(sizes, counts.values(), strict=True))
