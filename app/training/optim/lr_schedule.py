"""Learning rate of each optimizer step: a scheduler of torch and a linear warm-up."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from app.runtime.errors import UserError


class LRSchedule:
    """Steps one of torch's schedulers per step or per epoch, with a linear warm-up per step.

    The scheduler only sees the learning rates before warm-up, so any scheduler can be warmed up.

    Args:
        optimizer: Optimizer whose learning rates are set.
        lr_scheduler: Scheduler bound to the optimizer; None keeps the learning rates constant.
        per_epoch: Whether the scheduler steps at the end of each epoch rather than after each step.
        warmup_steps: Number of steps until the full learning rate is reached.
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
        self.unwarmed_lrs = [float(group["lr"]) for group in self.groups]
        self._apply_warmup()

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups of the optimizer."""
        return self.optimizer.param_groups

    @property
    def lr(self) -> float:
        """Learning rate of the next step, for the first parameter group."""
        return float(self.groups[0]["lr"])

    def on_step_end(self) -> None:
        """Update the learning rates after an optimizer step."""
        self.steps += 1
        if self.lr_scheduler is not None and not self.per_epoch:
            self._step_scheduler()
        elif self.steps <= self.warmup_steps:
            self._apply_warmup()

    def on_epoch_end(self, goal_value: float | None) -> None:
        """Update the learning rates after an epoch.

        Args:
            goal_value: Value of the goal's metric in this epoch, for `ReduceLROnPlateau`; None if
                it was not measured.
        """
        if self.lr_scheduler is None or not self.per_epoch:
            return
        if isinstance(self.lr_scheduler, ReduceLROnPlateau):
            self.on_validation(goal_value)
        else:
            self._step_scheduler()

    def on_validation(self, goal_value: float | None) -> None:
        """Update the learning rates after a validation within an epoch; see `on_epoch_end`."""
        is_plateau = isinstance(self.lr_scheduler, ReduceLROnPlateau) and self.per_epoch
        if is_plateau and goal_value is not None:
            self._step_scheduler(goal_value)

    def fast_forward(self, steps: int) -> None:
        """Advance to where the schedule is after that many optimizer steps.

        Epochs are not replayed here; call `on_epoch_end` for each of them.
        """
        # The steps were made before the run was resumed; without this, torch warns about the order.
        self.optimizer._opt_called = True  # type: ignore[attr-defined]
        for _ in range(steps):
            self.on_step_end()

    def _step_scheduler(self, *metric: float) -> None:
        assert self.lr_scheduler is not None
        for group, lr in zip(self.groups, self.unwarmed_lrs, strict=True):
            group["lr"] = lr
        self.lr_scheduler.step(*metric)  # type: ignore[arg-type]
        self.unwarmed_lrs = [float(group["lr"]) for group in self.groups]
        if not all(map(math.isfinite, self.unwarmed_lrs)):
            name = type(self.lr_scheduler).__name__
            raise UserError(
                f"scheduler.lr_scheduler: {name} returned the learning rate "
                f"{self.unwarmed_lrs[0]} after {self.steps} steps; it must be a finite number"
            )
        self._apply_warmup()

    def _apply_warmup(self) -> None:
        if self.warmup_steps:
            factor = min(1.0, (self.steps + 1) / self.warmup_steps)
            for group, lr in zip(self.groups, self.unwarmed_lrs, strict=True):
                group["lr"] = lr * factor

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint: tensors and plain values."""
        inner = self.lr_scheduler.state_dict() if self.lr_scheduler else None
        return {"steps": self.steps, "unwarmed_lrs": self.unwarmed_lrs, "lr_scheduler": inner}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state; the optimizer restores its current learning rates itself."""
        self.steps, self.unwarmed_lrs = state["steps"], list(state["unwarmed_lrs"])
        if self.lr_scheduler is not None and state["lr_scheduler"] is not None:
            self.lr_scheduler.load_state_dict(state["lr_scheduler"])
