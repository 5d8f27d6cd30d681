"""Training steps as a CUDA graph: recorded once, and replayed without a launch per kernel.

The technique is that of `torch.cuda.graph`: https://docs.pytorch.org/docs/stable/notes/cuda.html.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from app.config.rules import FUSED_OPTIMIZERS
from app.runtime.errors import UserError
from app.runtime.nested import Nested, iter_tensors, map_tensors
from app.training.optim.finite_check import is_fused
from app.training.optim.optim_wrapper import OptimWrapper

Learn = Callable[[Nested, Nested], Nested]
Record = Callable[[Callable[[], Nested]], tuple[Nested, Callable[[], None]]]
WARMUP_STEPS = 3  # before recording, so that libraries have chosen their kernels


def record_cuda_graph(function: Callable[[], Nested]) -> tuple[Nested, Callable[[], None]]:
    """Record the kernels of a function.

    Returns:
        What the function returned, whose tensors each replay fills, and what replays the kernels.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # loaders have threads, too
        results = function()
    return results, graph.replay


class GraphedStep:
    """Forward pass, loss, backward pass and optimizer step, replayed for batches of one form.

    Batches of another form, such as a shorter last one, are trained without the graph. Learning
    rates may change from step to step; they are rounded to float32.

    Args:
        learn: Trains on inputs and targets and returns tensors, of which each call of this object
            returns copies.
        wrapper: Wrapper of the optimizer that `learn` steps, of fused kernels.
        modules: All modules whose parameters or buffers a step changes.
        record: Records the kernels of a function.

    Raises:
        UserError: The optimizer has no fused kernels.
    """

    def __init__(
        self,
        learn: Learn,
        wrapper: OptimWrapper,
        modules: list[nn.Module],
        record: Record = record_cuda_graph,
    ) -> None:
        if not is_fused(wrapper.optimizer):
            raise UserError(
                f"trainer.cuda_graph=True: {type(wrapper.optimizer).__name__} has no fused kernels "
                f"here; allowed: {', '.join(FUSED_OPTIMIZERS)}, without foreach, differentiable, "
                "dampening and sparse gradients"
            )
        self.learn, self.wrapper, self.modules, self.record = learn, wrapper, modules, record
        self.lrs: list[Tensor] = []  # of each parameter group, on the device
        self.host_lrs: list[float] = []
        self.batch: list[Tensor] = []  # that the recorded step reads
        self.results: Nested = None  # that it fills
        self.replay: Callable[[], None] | None = None
        self.recorded_for: Any = None  # what the recorded step holds as constants

    def prepare(self, inputs: Nested, targets: Nested) -> None:
        """Record a step for the parameters that are trained now, with the options of now.

        Weights, buffers, optimizer and schedule are as before afterwards.

        Args:
            inputs: Inputs of a full batch.
            targets: Its targets.

        Raises:
            UserError: The schedule changes more than learning rates.
        """
        self.replay, self.recorded_for = None, self._constants()
        inputs, targets = map_tensors(Tensor.clone, (inputs, targets))
        self.batch = list(iter_tensors((inputs, targets)))
        with self._restored():
            self._warm_up(inputs, targets)
            self._read_lrs_on_device()
            self.results, replay = self.record(lambda: self._step(inputs, targets))
        self.replay = replay

    @property
    def is_ready(self) -> bool:
        """Whether a step is recorded for the parameters and options of now."""
        return self.replay is not None and self.recorded_for == self._constants()

    def _constants(self) -> Any:
        trained = [parameter.requires_grad for parameter in self.wrapper.parameters]
        return trained, self._other_options()

    def _warm_up(self, inputs: Nested, targets: Nested) -> None:
        """Make some steps as they are without a graph."""
        options = self._other_options()
        stream = torch.cuda.Stream() if self.batch[0].is_cuda else None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP_STEPS):
                self.learn(inputs, targets)
        if stream is not None:
            torch.cuda.current_stream().wait_stream(stream)
        if self._other_options() != options:
            raise UserError(
                "trainer.cuda_graph=True: the schedule changes momentum or betas in each step; "
                "allowed: schedules of the learning rate only, such as "
                "scheduler.lr_scheduler.cycle_momentum=false"
            )

    def _read_lrs_on_device(self) -> None:
        """Give the optimizer learning rates that are on the device, as recorded kernels need."""
        groups, device = self.wrapper.optimizer.param_groups, self.wrapper.device
        self.host_lrs = [float(group["lr"]) for group in groups]
        self.lrs = [torch.full((), lr, device=device) for lr in self.host_lrs]
        for group, lr in zip(groups, self.lrs, strict=True):
            group.update(lr=lr, capturable=True)

    def _step(self, inputs: Nested, targets: Nested) -> Nested:
        results = self.learn(inputs, targets)
        return map_tensors(Tensor.detach, (results, self.wrapper.grad_norm))

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Restore weights, buffers, optimizer and schedule after the block."""
        wrapper, optimizer = self.wrapper, self.wrapper.optimizer
        host_state = wrapper.host_state()
        capturable = [group.get("capturable") for group in optimizer.param_groups]
        tensors = [t for module in self.modules for t in _tensors_of(module)]
        kept = [tensor.detach().clone() for tensor in tensors]
        states = {id(t): t.clone() for t in iter_tensors(_states(optimizer))}
        yield
        wrapper.restore_host_state(host_state)
        for group, value in zip(optimizer.param_groups, capturable, strict=True):
            group.pop("capturable", None)
            if value is not None:
                group["capturable"] = value
        with torch.no_grad():
            for tensor, earlier in zip(tensors, kept, strict=True):
                tensor.copy_(earlier)
            for state in iter_tensors(_states(optimizer)):
                # States begin as zeros: step counts, moments, momentum.
                state.copy_(states[id(state)]) if id(state) in states else state.zero_()
        wrapper.grad_norm = None

    def _other_options(self) -> list[dict[str, Any]]:
        """Return the options of each parameter group without its learning rate."""
        without = ("lr", "params", "initial_lr")
        groups = self.wrapper.optimizer.param_groups
        return [{k: v for k, v in group.items() if k not in without} for group in groups]

    def __call__(self, inputs: Nested, targets: Nested) -> Nested:
        """Train on a batch; return what `learn` returns, without gradients."""
        batch = list(iter_tensors((inputs, targets)))
        if self.replay is None or not self._fits(batch):
            return self.learn(inputs, targets)
        torch._foreach_copy_(self.batch, batch)
        self._update_lrs()
        self.replay()
        results, grad_norm = map_tensors(Tensor.clone, self.results)
        self.wrapper.grad_norm = grad_norm
        self.wrapper.count_step()
        return results

    def _fits(self, batch: list[Tensor]) -> bool:
        return len(batch) == len(self.batch) and all(
            new.shape == old.shape and new.dtype == old.dtype
            for new, old in zip(batch, self.batch, strict=True)
        )

    def _update_lrs(self) -> None:
        for number, group in enumerate(self.wrapper.optimizer.param_groups):
            if group["lr"] != self.host_lrs[number]:
                self.host_lrs[number] = group["lr"]
                self.lrs[number].fill_(group["lr"])


def _tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _states(optimizer: torch.optim.Optimizer) -> list[Any]:
    return list(optimizer.state.values())
