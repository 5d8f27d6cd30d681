"""Check of the loss and the gradients for NaN and infinity before an optimizer step."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from app.config.rules import FUSED_OPTIMIZERS
from app.runtime.host_copy import HostCopy

NonFiniteAction = Literal["stop", "skip", "raise"]


class FiniteCheck:
    """Decides whether an optimizer may step; shared by all optimizers of a task.

    The decision is based on an indicator: a scalar on the device that is 0 if and only if the loss
    and all gradients are finite. It is read before the step, except on a CUDA device, where that
    would synchronize: if `policy` ends training anyway and the optimizer is fused, its kernel
    leaves the weights unchanged, and the host finds out some steps later.

    Args:
        policy: What to do about a non-finite step: end training, skip the step or raise. None
            checks nothing.
        device: Device of the weights.

    Attributes:
        defers: Whether to leave the decision to the device if the optimizer is fused.
        latch: Sum of the indicators, if the device decides or a step that ends training was
            refused. Once it is not 0 no optimizer steps.
        has_refused: Whether the host has refused a step since the last `pop_result`.
    """

    def __init__(
        self, policy: NonFiniteAction | None = "stop", device: torch.device | None = None
    ) -> None:
        self.policy = policy
        self.defers = policy != "skip" and device is not None and device.type == "cuda"
        self.latch: Tensor | None = None
        self.has_refused = False

    def reset(self, reads_every_step: bool) -> None:
        """Prepare for an epoch, in which steps may be made again, deferred or not."""
        self.has_refused = False
        self.defers = self.defers and not reads_every_step
        keeps_latch = self.defers and self.latch is not None  # a recorded step adds to this tensor
        self.latch = self.latch.zero_() if keeps_latch and self.latch is not None else None

    def pop_result(self) -> HostCopy | bool:
        """Return whether a step was refused, or a copy of the latch if the device decides."""
        refused, self.has_refused = self.has_refused, False
        if refused or self.latch is None:
            return refused
        # Only on CUDA is it copied before the next step adds to it.
        return HostCopy(self.latch if self.latch.is_cuda else self.latch.clone())

    def is_finite(self, indicator: Tensor) -> bool:
        """Read the indicator of a step, and return whether it may be made."""
        latched = indicator if self.latch is None else indicator + self.latch
        if latched.item() == 0:
            return True
        self.has_refused = True
        self.latch = None if self.policy == "skip" else latched
        return False

    def defer(self, indicator: Tensor, optimizer: Optimizer) -> Tensor:
        """Let the kernel of a fused optimizer skip the step if the indicator is not 0.

        Returns:
            1 if the step will be skipped, else 0; a scalar on the device.
        """
        self.latch = indicator.clone() if self.latch is None else self.latch.add_(indicator)
        found_inf = (self.latch != 0).float()
        optimizer.found_inf, optimizer.grad_scale = found_inf, None  # type: ignore[attr-defined]
        return found_inf


def is_fused(optimizer: Optimizer) -> bool:
    """Return whether the optimizer steps in one fused kernel, which does nothing if told so.

    The kernel reads `found_inf` of the optimizer: it does nothing if that is 1.
    """
    is_known = type(optimizer).__name__ in FUSED_OPTIMIZERS
    return is_known and all(group.get("fused") for group in optimizer.param_groups)


def fill_momentum_buffers(optimizer: Optimizer) -> None:
    """Give all parameters of a fused SGD a momentum buffer, since it cannot add one later.

    Parameters that are frozen or unused at first get their gradients later. A buffer of zeros is
    the gradient after one step, as torch's new buffers are without dampening.
    """
    for member in getattr(optimizer, "optimizers", [optimizer]):
        groups = [group for group in member.param_groups if isinstance(member, SGD)]
        for group in groups:
            if not group.get("fused") or not group["momentum"] or group["dampening"]:
                continue
            for parameter in group["params"]:
                state = member.state[parameter]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
