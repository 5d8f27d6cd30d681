"""Weights of a loss's terms that change: by a schedule, or learned."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from app.runtime.errors import UserError


class ScheduledWeight(nn.Module):
    """A weight that is a function of the step or the epoch.

    Args:
        function: From a step or epoch, counted from 1, to the weight.
        per: What it is a function of; steps are batches of training.
    """

    def __init__(
        self, function: Callable[[int], float], per: Literal["step", "epoch"] = "epoch"
    ) -> None:
        super().__init__()
        if per not in ("step", "epoch"):
            raise ValueError(f"per={per!r} does not fit; allowed: step, epoch")
        self.function, self.per = function, per
        self.at, self.value = 0, math.nan
        self.progress("weight", 1, 1)

    def progress(self, key: str, epoch: int, step: int) -> None:
        """Sets the value.

        Args:
            key: Its place in the configuration, for the error.
            epoch: Counted from 1.
            step: Counted from 1.

        Raises:
            UserError: It is no finite number.
        """
        now = step if self.per == "step" else epoch
        if now != self.at:
            self.at, self.value = now, self._value(key, now)

    def _value(self, key: str, now: int) -> float:
        value = float(self.function(now))
        if not math.isfinite(value):
            raise UserError(f"{key} is {value} at {self.per} {now}; a finite number is wanted")
        return value

    def get_extra_state(self) -> dict[str, Any]:
        """Where it stands: testing weighs as the checkpoint's epoch did."""
        return {"at": self.at, "value": self.value}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.at, self.value = int(state["at"]), float(state["value"])


class UncertaintyWeight(nn.Module):
    """A weight that is learned from the term's own uncertainty (Kendall et al. 2018, eq. 10).

    The term becomes `exp(-s) * value + s / 2`, with half of the first part for a regression;
    `s = log(sigma^2)` is a parameter that the optimizer learns with the model.

    Args:
        kind: `classification` or `regression`, as the likelihood of the term.
        initial: `s` at the start.
    """

    def __init__(
        self,
        kind: Literal["classification", "regression"] = "classification",
        initial: float = 0.0,
    ) -> None:
        super().__init__()
        if kind not in ("classification", "regression"):
            raise ValueError(f"kind={kind!r} does not fit; allowed: classification, regression")
        self.scale = 0.5 if kind == "regression" else 1.0
        self.log_variance = nn.Parameter(torch.tensor(float(initial)))

    @property
    def factor(self) -> Tensor:
        """What the value is multiplied by."""
        return self.scale * torch.exp(-self.log_variance)

    def forward(self, value: Tensor) -> Tensor:
        return self.factor * value + self.log_variance / 2


class LinearSchedule:
    """From one value to another, evenly; then constant.

    Args:
        start: At the first step or epoch.
        end: At step or epoch `last` and after it.
        last: Counted from 1.
    """

    def __init__(self, start: float, end: float, last: int) -> None:
        if last < 2:
            raise ValueError(f"last={last} must be at least 2")
        self.start, self.end, self.last = start, end, last

    def __call__(self, now: int) -> float:
        share = min(1.0, (now - 1) / (self.last - 1))
        return self.start + share * (self.end - self.start)


class StepSchedule:
    """A value that changes at given steps or epochs.

    Args:
        start: Up to the first of them.
        values: From the step or epoch that each key names.
    """

    def __init__(self, start: float, values: dict[Any, float]) -> None:
        self.start = start
        self.values = dict(sorted((int(first), float(v)) for first, v in values.items()))

    def __call__(self, now: int) -> float:
        reached = [value for first, value in self.values.items() if first <= now]
        return reached[-1] if reached else self.start
