"""A loss as the weighted sum of named terms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from app.losses.dice import DiceCrossEntropyLoss, DiceLoss
from app.losses.focal import FocalLoss
from app.losses.weights import ScheduledWeight, UncertaintyWeight
from app.runtime.errors import UserError
from app.runtime.nested import Key, Nested, describe, pick

Function = Callable[..., Tensor]
REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError)


@dataclass(frozen=True)
class Term:
    """One term of a loss.

    Attributes:
        function: From outputs and targets to a scalar, the mean over the batch. Several values
            (`reduction: none`) are averaged; with `reduction: sum` the term is a sum.
        weight: Its factor in the sum: a number, a schedule, or learned.
        output: Which part of the outputs it takes; None takes them whole.
        target: Which part of the targets it takes; None takes them whole.
    """

    function: Function
    weight: float | ScheduledWeight | UncertaintyWeight = 1.0
    output: Key = None
    target: Key = None

    def __post_init__(self) -> None:
        if isinstance(self.weight, (int, float)) and not math.isfinite(self.weight):
            raise ValueError(f"weight={self.weight} must be a finite number")

    def value(self, outputs: Nested, targets: Nested) -> Tensor:
        """Unweighted."""
        return self.function(pick(outputs, self.output), pick(targets, self.target))

    def weighted(self, value: Tensor) -> Tensor:
        """The value times the weight; a weight of 1 costs no operation."""
        if isinstance(self.weight, UncertaintyWeight):
            weighed: Tensor = self.weight(value)
            return weighed
        factor = self.weight.value if isinstance(self.weight, ScheduledWeight) else self.weight
        return value if factor == 1 else factor * value


class WeightedSum(nn.Module):
    """The sum of the terms, each times its weight.

    Args:
        terms: By name, at least one.
    """

    def __init__(self, terms: Mapping[str, Term]) -> None:
        super().__init__()
        self.terms = dict(terms)
        parts = {
            f"{name}_{part}": module
            for name, term in terms.items()
            for part, module in (("function", term.function), ("weight", term.weight))
            if isinstance(module, nn.Module)
        }
        self.parts = nn.ModuleDict(parts)
        self.schedules = {
            name: term.weight
            for name, term in terms.items()
            if isinstance(term.weight, ScheduledWeight)
        }
        self.has_columns = len(terms) > 1 or any(term.weight != 1 for term in terms.values())

    @property
    def columns(self) -> set[str]:
        """The names of what it adds to the tables beside the total."""
        changing = {*self.scheduled(), *self.learned()}
        return {*self.terms, *changing} if self.has_columns else set()

    def forward(self, outputs: Nested, targets: Nested) -> tuple[Tensor, dict[str, Tensor]]:
        """The total, and the value of each term, unweighted, where it is not the total.

        Raises:
            UserError: Names the term that cannot take what it is given.
        """
        values = {name: self._value(name, outputs, targets) for name in self.terms}
        weighted = [self.terms[name].weighted(value) for name, value in values.items()]
        total = sum(weighted[1:], start=weighted[0])
        return total, values if self.has_columns else {}

    def _value(self, name: str, outputs: Nested, targets: Nested) -> Tensor:
        term = self.terms[name]
        try:
            value = term.value(outputs, targets)
        except torch.OutOfMemoryError:
            raise
        except (*REFUSALS, UserWarning) as error:  # a warning where warnings are made errors
            whole = term.output is None and isinstance(outputs, (dict, tuple, list))
            hint = f"; loss.{name}.output names a part of the outputs" if whole else ""
            raise UserError(
                f"loss.{name}: cannot take outputs ({describe(outputs)}) with targets "
                f"({describe(targets)}): {error}{hint}"
            ) from error
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise UserError(
                f"loss.{name}: must give a number, the mean over the batch; it gave "
                f"{describe(value)}"
            )
        return value.mean() if value.ndim else value

    def progress(self, epoch: int, step: int) -> None:
        """Sets the scheduled weights for the step that comes; both are counted from 1.

        Raises:
            UserError: A schedule gives no finite number.
        """
        for name, schedule in self.schedules.items():
            schedule.progress(f"loss.{name}.weight", epoch, step)

    def scheduled(self) -> dict[str, float]:
        """The weights that are scheduled, as `<term>_weight`."""
        return {f"{name}_weight": schedule.value for name, schedule in self.schedules.items()}

    def learned(self) -> dict[str, Tensor]:
        """The weights that are learned, as `<term>_weight`; on the device."""
        return {
            f"{name}_weight": term.weight.factor
            for name, term in self.terms.items()
            if isinstance(term.weight, UncertaintyWeight)
        }


LOGITS = (  # losses that take what the model gives as logits of classes
    nn.CrossEntropyLoss,
    DiceLoss,
    DiceCrossEntropyLoss,
    FocalLoss,
)


def class_outputs(loss: WeightedSum) -> list[Key]:
    """The parts of the outputs that are logits of classes, as the terms that take them show."""
    terms = loss.terms.values()
    return [term.output for term in terms if isinstance(term.function, LOGITS)]


def as_loss(loss: WeightedSum | Term | Function | Mapping[str, Term | Function]) -> WeightedSum:
    """A loss from terms by name, or from a single one."""
    if isinstance(loss, WeightedSum):
        return loss
    named = loss if isinstance(loss, Mapping) else {"main": loss}
    return WeightedSum({n: t if isinstance(t, Term) else Term(t) for n, t in named.items()})


class MeanOutputLoss(nn.Module):
    """The mean of the output; the target is not looked at."""

    def forward(self, output: Tensor, target: object) -> Tensor:  # noqa: ARG002 - losses take two
        """Losses of any shape to their mean."""
        return output.mean()
