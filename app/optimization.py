"""From a loss to changed weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from app.schedule import Schedule


class Optimization:
    """Backward, accumulate, clip, step, schedule.

    Args:
        optimizer: Of the parameters.
        schedule: Of its learning rate.
        scaler: Of the gradients; does nothing unless they are fp16.
        batch_size: Samples in a full batch.
        accumulate: Batches to one step of the optimizer.
        clip_norm: Largest norm of all gradients together, or None.
        clip_value: Largest absolute value of a gradient, or None.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedule: Schedule,
        scaler: torch.amp.GradScaler,
        batch_size: int,
        accumulate: int = 1,
        clip_norm: float | None = None,
        clip_value: float | None = None,
    ) -> None:
        self.optimizer, self.schedule, self.scaler = optimizer, schedule, scaler
        self.accumulate, self.full = accumulate, batch_size * accumulate
        self.clip_norm, self.clip_value = clip_norm, clip_value
        self.steps = self.batches = self.samples = 0

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self.schedule.lr

    def step(self, loss: Tensor, num_samples: int) -> None:
        """Learns from the mean loss of so many samples; changes the weights when it is time to."""
        if self.accumulate > 1:
            loss = loss * (num_samples / self.full)
        self.scaler.scale(loss).backward()
        self.batches += 1
        self.samples += num_samples
        if self.batches == self.accumulate:
            self._update()

    def finish(self) -> None:
        """Uses what has accumulated; an epoch ends."""
        if self.batches:
            self._update()

    def _update(self) -> None:
        if self.scaler.is_enabled() and (self.clip_value or self.clip_norm):
            self.scaler.unscale_(self.optimizer)
        if self.accumulate > 1 and self.samples != self.full:
            # Short groups: as one batch of just these samples.
            torch._foreach_mul_(list(self._gradients()), self.full / self.samples)
        if self.clip_value is not None:
            torch.nn.utils.clip_grad_value_(self._parameters(), self.clip_value)
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters(), self.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step_end()
        self.steps += 1
        self.batches = self.samples = 0

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values of the optimizer, the schedule and the scaler."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "steps": self.steps,
        }

    def _parameters(self) -> Iterable[Tensor]:
        return (p for group in self.optimizer.param_groups for p in group["params"])

    def _gradients(self) -> Iterable[Tensor]:
        return (p.grad for p in self._parameters() if p.grad is not None)
