"""Check of the loss and the gradients for NaN and infinity before an optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from app.runtime.host_copy import HostCopy

NonFiniteAction = Literal["stop", "skip", "raise"]
TraceHook = Callable[[list[Tensor], Tensor], None]
FUSED_OPTIMIZERS = ("Adam", "AdamW", "SGD")  # their fused kernels do nothing if `found_inf` is 1


class FiniteCheck:
    """Decides whether an optimizer may step; shared by all optimizers of a task.

    The decision is based on an indicator: a scalar on the device that is finite if and only if the
    loss and all gradients are. On the CPU it is read at once. On a CUDA device, reading it would
    synchronize once per step. If `policy` ends training anyway and the optimizer is fused, nothing
    is read: from the first non-finite step on the fused kernel leaves the weights unchanged, and
    the host finds out some steps later.

    Args:
        policy: What to do about a non-finite step: end training, skip the step or raise. None
            checks nothing.
        device: Device of the weights.

    Attributes:
        defers: Whether to leave the decision to the device if the optimizer is fused.
        is_latched: Whether all further steps are refused, until the next `reset`.
        found_inf: Accumulated indicator of the steps left to the device; NaN once one of them was
            non-finite.
        results: What happened to the optimizer steps of the current batch.
        trace_hook: Called with the parameters and the loss instead of making a step; see `tracing`.
    """

    def __init__(
        self, policy: NonFiniteAction | None = "stop", device: torch.device | None = None
    ) -> None:
        self.policy = policy
        self.defers = policy != "skip" and device is not None and device.type == "cuda"
        self.is_latched = False
        self.found_inf: Tensor | None = None
        self.results: list[StepResult] = []
        self.trace_hook: TraceHook | None = None

    def reset(self, reads_every_step: bool) -> None:
        """Prepare for an epoch; steps may be made again.

        Args:
            reads_every_step: Whether the indicator must be read before each step.
        """
        self.is_latched, self.found_inf, self.results = False, None, []
        self.defers = self.defers and not reads_every_step

    def pop_results(self) -> list[StepResult]:
        """Return what happened to the optimizer steps of the batch, and begin the next one."""
        results, self.results = self.results, []
        return results

    def is_finite(self, indicator: Tensor) -> bool:
        """Read the indicator of a step, and return whether it may be made."""
        was_skipped = not math.isfinite(indicator.item())
        self.results.append(StepResult(was_skipped))
        self.is_latched = was_skipped and self.policy != "skip"
        return not was_skipped

    def defer(self, indicator: Tensor, optimizer: Optimizer, undo: Callable[[], None]) -> None:
        """Let the kernel of a fused optimizer skip the step if the indicator is not finite.

        Args:
            indicator: Indicator of the step.
            optimizer: Optimizer that is about to step.
            undo: Reverts what the host does after the step, if the device skips it.
        """
        nan_or_zero = indicator.detach() * 0  # once NaN, the sum below stays NaN
        self.found_inf = nan_or_zero if self.found_inf is None else self.found_inf + nan_or_zero
        found_inf = self.found_inf.isnan().float()
        optimizer.found_inf, optimizer.grad_scale = found_inf, None  # type: ignore[attr-defined]
        self.results.append(StepResult(found_inf, undo))

    @contextmanager
    def tracing(self, hook: TraceHook) -> Iterator[None]:
        """Call the hook in place of each optimizer step inside the `with` block."""
        self.trace_hook = hook
        try:
            yield
        finally:
            self.trace_hook = None


class StepResult:
    """Whether an optimizer step was skipped, which the host may not know yet.

    Args:
        found_inf: Whether it was skipped; or a tensor on the device, 1 if it was skipped, whose
            copy to the host begins now and blocks nothing.
        undo: Reverts what the host did after a step that the device skipped.
    """

    def __init__(self, found_inf: Tensor | bool, undo: Callable[[], None] = lambda: None) -> None:
        self.undo = undo
        self.is_known = isinstance(found_inf, bool)
        self.found_inf = HostCopy(found_inf) if isinstance(found_inf, Tensor) else found_inf

    def was_skipped(self) -> bool:
        """Return whether the step was skipped, after waiting for the copy if necessary."""
        found_inf = self.found_inf
        return bool(found_inf.get()) if isinstance(found_inf, HostCopy) else found_inf


def is_fused(optimizer: Optimizer) -> bool:
    """Return whether the optimizer steps in one fused kernel that honours `found_inf`."""
    groups = optimizer.param_groups
    fused = all(group.get("fused") for group in groups)
    sharded = any(
        isinstance(parameter, DTensor) for group in groups for parameter in group["params"]
    )
    return fused and not sharded and type(optimizer).__name__ in FUSED_OPTIMIZERS
