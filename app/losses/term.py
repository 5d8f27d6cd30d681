"""A loss as the weighted sum of named terms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

Function = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Term:
    """One term of a loss.

    Attributes:
        function: From outputs and targets to a scalar, the mean over the batch.
        weight: Its factor in the sum.
    """

    function: Function
    weight: float = 1.0

    def weighted(self, value: Tensor) -> Tensor:
        """The value times the weight; a weight of 1 costs no operation."""
        return value if self.weight == 1 else self.weight * value


class WeightedSum(nn.Module):
    """The sum of the terms, each times its weight.

    Args:
        terms: By name, at least one.
    """

    def __init__(self, terms: dict[str, Term]) -> None:
        super().__init__()
        self.terms = terms
        functions = {name: term.function for name, term in terms.items()}
        self.modules_ = nn.ModuleDict(
            {name: f for name, f in functions.items() if isinstance(f, nn.Module)}
        )

    def forward(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The total, and the value of each term, unweighted, where there are several."""
        values = {name: term.function(outputs, targets) for name, term in self.terms.items()}
        weighted = [self.terms[name].weighted(value) for name, value in values.items()]
        total = sum(weighted[1:], start=weighted[0])
        return total, values if len(values) > 1 else {}
