"""Weights of loss terms that change during training, by a schedule or by learning."""

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
        function: Maps a step or an epoch, counted from 1, to the weight.
        per: Argument of the function; a step is a training batch.
    """

    def __init__(
        self, function: Callable[[int], float], per: Literal["step", "epoch"] = "epoch"
    ) -> None:
        super().__init__()
        if per not in ("step", "epoch"):
            raise ValueError(f"per={per!r} is not valid; allowed: step, epoch")
        self.function, self.per = function, per
        self.index, self.value = 0, math.nan
        self.update("weight", 1, 1)

    def update(self, key: str, epoch: int, step: int) -> None:
        """Set the value for an epoch and a step.

        Args:
            key: Configuration key of the weight, for the error.
            epoch: Epoch, counted from 1.
            step: Step, counted from 1.

        Raises:
            UserError: The value is not finite.
        """
        index = step if self.per == "step" else epoch
        if index != self.index:
            self.index, self.value = index, self._evaluate(key, index)

    def _evaluate(self, key: str, index: int) -> float:
        value = float(self.function(index))
        if not math.isfinite(value):
            raise UserError(f"{key} is {value} at {self.per} {index}; it must be finite")
        return value

    def get_extra_state(self) -> dict[str, Any]:
        """Return the value, so that a test uses the weight of the checkpoint's epoch."""
        return {"at": self.index, "value": self.value}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.index, self.value = int(state["at"]), float(state["value"])


class UncertaintyWeight(nn.Module):
    """A weight learned from the uncertainty of its term.

    The weighted term is `exp(-s) * value + s / 2` for a classification and
    `exp(-s) * value / 2 + s / 2` for a regression, where `s = log(sigma^2)` is a parameter that is
    trained with the model. Equation 10 of Kendall et al., "Multi-Task Learning Using Uncertainty to
    Weigh Losses for Scene Geometry and Semantics", 2018.

    Args:
        kind: Likelihood of the term, `classification` or `regression`.
        initial: Initial value of `s`.
    """

    def __init__(
        self,
        kind: Literal["classification", "regression"] = "classification",
        initial: float = 0.0,
    ) -> None:
        super().__init__()
        if kind not in ("classification", "regression"):
            raise ValueError(f"kind={kind!r} is not valid; allowed: classification, regression")
        self.scale = 0.5 if kind == "regression" else 1.0
        self.log_variance = nn.Parameter(torch.tensor(float(initial)))

    @property
    def factor(self) -> Tensor:
        """Factor of the value in the weighted term."""
        return self.scale * torch.exp(-self.log_variance)

    def forward(self, value: Tensor) -> Tensor:
        return self.factor * value + self.log_variance / 2


class LinearSchedule:
    """Linear change from one value to another, then constant.

    Args:
        start: Value at the first step or epoch.
        end: Value from step or epoch `last` on.
        last: Step or epoch, counted from 1, that reaches `end`.
    """

    def __init__(self, start: float, end: float, last: int) -> None:
        if last < 2:
            raise ValueError(f"last={last} must be at least 2")
        self.start, self.end, self.last = start, end, last

    def __call__(self, index: int) -> float:
        fraction = min(1.0, (index - 1) / (self.last - 1))
        return self.start + fraction * (self.end - self.start)


class StepSchedule:
    """Piecewise constant value that changes at given steps or epochs.

    Args:
        start: Initial value.
        values: New values by the step or epoch, counted from 1, at which they begin.
    """

    def __init__(self, start: float, values: dict[Any, float]) -> None:
        self.start = start
        self.values = dict(sorted((int(first), float(v)) for first, v in values.items()))

    def __call__(self, index: int) -> float:
        reached = [value for first, value in self.values.items() if first <= index]
        return reached[-1] if reached else self.start
