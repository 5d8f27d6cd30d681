"""The learning rate, step by step."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from app.runtime.errors import UserError


class LRSchedule:
    """One of torch's schedulers per step or per epoch, times a linear warm-up per step.

    The scheduler sees the rates without the warm-up, so that any of them can be warmed up.

    Args:
        optimizer: Whose rates are set.
        lr_scheduler: None keeps them.
        per_epoch: The scheduler is stepped at the end of an epoch, not after each step.
        warmup_steps: Steps until the full rate.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        lr_scheduler: LRScheduler | None = None,
        per_epoch: bool = False,
        warmup_steps: int = 0,
    ) -> None:
        self.optimizer = optimizer
        self.lr_scheduler, self.per_epoch = lr_scheduler, per_epoch
        self.warmup_steps, self.steps = warmup_steps, 0
        self.rates = [float(group["lr"]) for group in self.groups]
        self._apply()

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups of parameters."""
        return self.optimizer.param_groups

    @property
    def lr(self) -> float:
        """The rate of the next step (of the first group of parameters)."""
        return float(self.groups[0]["lr"])

    def step_end(self) -> None:
        """The optimizer has made a step."""
        self.steps += 1
        if self.lr_scheduler is not None and not self.per_epoch:
            self._advance()
        elif self.steps <= self.warmup_steps:
            self._apply()

    def epoch_end(self, goal_value: float | None) -> None:
        """An epoch is over; `goal_value` is None where the goal was not measured in it."""
        if self.lr_scheduler is None or not self.per_epoch:
            return
        if not isinstance(self.lr_scheduler, ReduceLROnPlateau):
            self._advance()
        elif goal_value is not None:
            self._advance(goal_value)

    def go_to(self, steps: int) -> None:
        """Where it would be after so many steps; epochs are told by `epoch_end`."""
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # in the run that was cut
        for _ in range(steps):
            self.step_end()

    def _advance(self, *value: float) -> None:
        assert self.lr_scheduler is not None
        for group, rate in zip(self.groups, self.rates, strict=True):
            group["lr"] = rate
        self.lr_scheduler.step(*value)  # type: ignore[arg-type]
        self.rates = [float(group["lr"]) for group in self.groups]
        if not all(map(math.isfinite, self.rates)):
            name = type(self.lr_scheduler).__name__
            raise UserError(
                f"scheduler.lr_scheduler: {name} gave the learning rate {self.rates[0]} after "
                f"{self.steps} steps; a finite number is wanted"
            )
        self._apply()

    def _apply(self) -> None:
        if self.warmup_steps:
            factor = min(1.0, (self.steps + 1) / self.warmup_steps)
            for group, rate in zip(self.groups, self.rates, strict=True):
                group["lr"] = rate * factor

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        inner = self.lr_scheduler.state_dict() if self.lr_scheduler else None
        return {"steps": self.steps, "rates": self.rates, "lr_scheduler": inner}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave; the optimizer has its own rates back already."""
        self.steps, self.rates = state["steps"], list(state["rates"])
        if self.lr_scheduler is not None and state["lr_scheduler"] is not None:
            self.lr_scheduler.load_state_dict(state["lr_scheduler"])
