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
        policy: What to do about a non-finite step: end training, skip the step or raise.
        device: Device of the weights.

    Attributes:
        syncs: Whether the indicator is read before each step.
        skipped: Whether a step of the current batch was skipped.
        is_latched: Whether all further steps are refused.
        found_inf: Accumulated indicator of the steps that were not read; NaN once one of them was
            non-finite.
        trace_hook: Called with the parameters and the loss instead of making a step; see `tracing`.
    """

    def __init__(
        self, policy: NonFiniteAction = "stop", device: torch.device | None = None
    ) -> None:
        self.policy = policy
        self.syncs = policy == "skip" or device is None or device.type != "cuda"
        self.skipped = self.is_latched = False
        self.found_inf: Tensor | None = None
        self.trace_hook: TraceHook | None = None

    def reset(self, syncs_every_step: bool) -> None:
        """Prepare for an epoch; steps may be made again.

        Args:
            syncs_every_step: Whether the indicator must be read before each step.
        """
        self.skipped = self.is_latched = False
        self.found_inf = None
        self.syncs = self.syncs or syncs_every_step

    def latch(self) -> None:
        """Refuse all steps until the next `reset`."""
        self.is_latched = True

    def pop_skipped(self) -> bool:
        """Return whether a step of the current batch was skipped, and begin the next batch."""
        skipped, self.skipped = self.skipped, False
        return skipped

    @contextmanager
    def tracing(self, hook: TraceHook) -> Iterator[None]:
        """Call the hook in place of each optimizer step inside the `with` block."""
        self.trace_hook = hook
        try:
            yield
        finally:
            self.trace_hook = None

    def is_finite(
        self, indicator: Tensor, optimizer: Optimizer, steps: int, has_scaler: bool = False
    ) -> bool:
        """Return whether the optimizer may step now; all ranks must call this.

        Args:
            indicator: Finite if and only if the loss and the gradients of this step are.
            optimizer: Optimizer that is about to step.
            steps: Number of steps it has made. The first one is always checked on the host, as
                fused SGD has no momentum buffers before it.
            has_scaler: Whether a gradient scaler is used, which sets `found_inf` itself.
        """
        if self.is_latched:
            return False
        if not (self.syncs or has_scaler) and steps and is_fused(optimizer):
            self._defer_to_device(indicator, optimizer)
            return True
        if math.isfinite(indicator.item()):
            return True
        self.skipped, self.is_latched = True, self.policy != "skip"
        return False

    def _defer_to_device(self, indicator: Tensor, optimizer: Optimizer) -> None:
        nan_or_zero = indicator.detach() * 0  # once NaN, the sum below stays NaN
        self.found_inf = nan_or_zero if self.found_inf is None else self.found_inf + nan_or_zero
        optimizer.found_inf = self.found_inf.isnan().float()  # type: ignore[attr-defined]
        optimizer.grad_scale = None  # type: ignore[attr-defined]


def is_fused(optimizer: Optimizer) -> bool:
    """Return whether the optimizer steps in one fused kernel that honours `found_inf`."""
    groups = optimizer.param_groups
    fused = all(group.get("fused") for group in groups)
    sharded = any(
        isinstance(parameter, DTensor) for group in groups for parameter in group["params"]
    )
    return fused and not sharded and type(optimizer).__name__ in FUSED_OPTIMIZERS


class AsyncScalar:
    """Scalar that is copied from the device to the host without blocking.

    Args:
        value: Scalar tensor on any device.
    """

    def __init__(self, value: Tensor) -> None:
        on_cuda = value.is_cuda
        self.host = torch.empty_like(value, device="cpu", pin_memory=on_cuda)
        self.host.copy_(value, non_blocking=on_cuda)
        self.copied = torch.cuda.Event() if on_cuda else None
        if self.copied is not None:
            self.copied.record()

    def read(self) -> float:
        """Return the value, after waiting for the copy if it is not complete."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.host.item()
