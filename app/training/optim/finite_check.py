"""Whether a step of an optimizer may be made: decided before the weights change."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

Policy = Literal["stop", "skip", "raise"]
FUSED = ("Adam", "AdamW", "SGD")  # of torch: their fused steps do nothing where `found_inf` is 1


class FiniteCheck:
    """Looks at what each step is to be made of; shared by all optimizers of a task.

    What it looks at is `evidence`: a scalar on the device, finite where the loss and all gradients
    are. On the CPU it is read at once. On a CUDA device reading it means to wait for the device
    once per step; where the policy ends the training anyway and the optimizer is fused, nobody
    waits: the device itself makes no step from the first bad one on, and the host learns of it
    some steps later.

    Args:
        policy: What follows a step that may not be made.
        device: That of the weights.

    Attributes:
        reads: Evidence is read before each step.
        refused: A step of the batch under way has not been made.
        is_over: No further step is made.
        evidence: Of all steps so far that have not been read; NaN where one of them was bad.
        replay: Gets the loss in place of a step, while one is looked into.
    """

    def __init__(self, policy: Policy = "stop", device: torch.device | None = None) -> None:
        self.policy = policy
        self.syncs = policy == "skip" or device is None or device.type != "cuda"
        self.skipped = self.is_latched = False
        self.found_inf: Tensor | None = None
        self.trace_hook: Callable[[list[Tensor], Tensor], None] | None = None

    def is_finite(
        self, evidence: Tensor, optimizer: Optimizer, steps: int, scaled: bool = False
    ) -> bool:
        """Whether the optimizer may make its step now; all ranks must ask.

        Args:
            evidence: Of this step.
            optimizer: Whose step.
            steps: That it has made; the first is always read, for fused SGD has no momentum yet.
            scaled: A scaler of gradients has a word in it, which uses what would be used here.
        """
        if self.is_latched:
            return False
        if not (self.syncs or scaled) and steps and is_fused(optimizer):
            self._defer_to_device(evidence, optimizer)
            return True
        if math.isfinite(evidence.item()):
            return True
        self.skipped, self.is_latched = True, self.policy != "skip"
        return False

    def _defer_to_device(self, evidence: Tensor, optimizer: Optimizer) -> None:
        now = evidence.detach() * 0  # NaN stays NaN, whatever comes later
        self.found_inf = now if self.found_inf is None else self.found_inf + now
        optimizer.found_inf = self.found_inf.isnan().float()  # type: ignore[attr-defined]
        optimizer.grad_scale = None  # type: ignore[attr-defined]


def is_fused(optimizer: Optimizer) -> bool:
    """Whether its steps are made by one kernel that can be told to do nothing."""
    groups = optimizer.param_groups
    fused = all(group.get("fused") for group in groups)
    sharded = any(
        isinstance(parameter, DTensor) for group in groups for parameter in group["params"]
    )
    return fused and not sharded and type(optimizer).__name__ in FUSED


class AsyncScalar:
    """A number on its way from the device to the host.

    Args:
        value: A scalar on the device.
    """

    def __init__(self, value: Tensor) -> None:
        on_cuda = value.is_cuda
        self.host = torch.empty_like(value, device="cpu", pin_memory=on_cuda)
        self.host.copy_(value, non_blocking=on_cuda)
        self.arrived = torch.cuda.Event() if on_cuda else None
        if self.arrived is not None:
            self.arrived.record()

    def read(self) -> float:
        """Waits for it, if it is not there yet."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.host.item()
