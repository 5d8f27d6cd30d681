"""Loss as a weighted sum of named terms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from app.losses.dice import DiceCrossEntropyLoss, DiceLoss
from app.losses.focal import FocalLoss
from app.losses.normalizer import normalized_loss, normalizer
from app.losses.weights import ScheduledWeight, UncertaintyWeight
from app.runtime.errors import UserError
from app.runtime.nested import Key, Nested, describe, pick
from app.runtime.rank_sums import share_of_mean

LossFunction = Callable[..., Tensor]
LOGIT_LOSSES = (  # losses whose outputs are class logits
    nn.CrossEntropyLoss,
    DiceLoss,
    DiceCrossEntropyLoss,
    FocalLoss,
)
LOSS_ERRORS = (  # that a loss function raises for outputs or targets that it does not support
    RuntimeError,
    ValueError,
    TypeError,
    IndexError,
    AttributeError,
    UserWarning,  # where warnings are turned into errors
)


@dataclass(frozen=True)
class Term:
    """One term of a loss.

    Attributes:
        function: Maps outputs and targets to a scalar, the mean over the batch. A tensor of
            several values (`reduction: none`) is averaged; a sum (`reduction: sum`) is used as is.
        weight: Factor of the term: a number, a schedule or a learned weight.
        output: Key of the outputs to pass to the function; None passes all of them.
        target: Key of the targets to pass to the function; None passes all of them.
    """

    function: LossFunction
    weight: float | ScheduledWeight | UncertaintyWeight = 1.0
    output: Key = None
    target: Key = None

    def __post_init__(self) -> None:
        if isinstance(self.weight, (int, float)) and not math.isfinite(self.weight):
            raise ValueError(f"weight={self.weight} must be a finite number")

    def compute(self, outputs: Nested, targets: Nested) -> Tensor:
        """Return the unweighted value."""
        output, target = pick(outputs, self.output), pick(targets, self.target)
        divisor = self._normalizer(target)
        if divisor is not None and isinstance(self.function, (nn.CrossEntropyLoss, nn.NLLLoss)):
            return normalized_loss(self.function, output, target, divisor)
        return self.function(output, target)

    def samples_weight(self, targets: Nested) -> Tensor | None:
        """Return how many samples the batch counts for in a mean over batches.

        It differs from the number of samples for class weights and ignored positions: the weight of
        a sample is then the mean weight of its positions.

        Args:
            targets: Targets of the batch.

        Returns:
            A scalar, or None for the number of samples.
        """
        target = pick(targets, self.target)
        divisor = self._normalizer(target)
        return None if divisor is None else divisor * (len(target) / max(1, target.numel()))

    def share_of_mean(self, value: Tensor, targets: Nested) -> Tensor:
        """Scale the value so that its mean over ranks and accumulated batches is exact.

        That is the mean weighted by samples, as several terms need it, since each of them may
        divide by another number. A single term has no need of it: its batches count by
        `samples_weight`.
        """
        target = pick(targets, self.target)
        divisor = self._normalizer(target)
        return value if divisor is None else share_of_mean(value, divisor, len(target))

    def _normalizer(self, target: Nested) -> Tensor | None:
        return normalizer(self.function, target) if isinstance(target, Tensor) else None

    def apply_weight(self, value: Tensor) -> Tensor:
        """Return the value times the weight; a weight of 1 needs no operation."""
        if isinstance(self.weight, UncertaintyWeight):
            weighted: Tensor = self.weight(value)
            return weighted
        factor = self.weight.value if isinstance(self.weight, ScheduledWeight) else self.weight
        return value if factor == 1 else factor * value


class WeightedSum(nn.Module):
    """Sum of the weighted terms.

    Args:
        terms: Terms by name, at least one.
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
        self.has_term_columns = len(terms) > 1 or any(term.weight != 1 for term in terms.values())

    @property
    def columns(self) -> set[str]:
        """Names of the table columns that the loss adds to that of the total."""
        weights = {*self.scheduled_weights(), *self.learned_weights()}
        return {*self.terms, *weights} if self.has_term_columns else set()

    def forward(
        self, outputs: Nested, targets: Nested, is_part: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the total and the unweighted value of each term.

        The values are empty for a single term of weight 1, which is equal to the total.

        Args:
            outputs: Outputs of the model.
            targets: Targets of the batch.
            is_part: Whether the total is added to other losses, so that batches count by samples
                and not by `samples_weight`.

        Raises:
            UserError: A term does not support its outputs and targets.
        """
        values = {name: self._compute_term(name, outputs, targets) for name in self.terms}
        if is_part or len(values) > 1:
            values = {n: self.terms[n].share_of_mean(value, targets) for n, value in values.items()}
        weighted = [self.terms[name].apply_weight(value) for name, value in values.items()]
        total = sum(weighted[1:], start=weighted[0])
        return total, values if self.has_term_columns else {}

    def _compute_term(self, name: str, outputs: Nested, targets: Nested) -> Tensor:
        term = self.terms[name]
        try:
            value = term.compute(outputs, targets)
        except torch.OutOfMemoryError:
            raise
        except LOSS_ERRORS as error:
            takes_all = term.output is None and isinstance(outputs, (dict, tuple, list))
            hint = f"; set loss.{name}.output to select one of the outputs" if takes_all else ""
            # A `UserError` says that there are no such outputs or targets.
            is_missing = isinstance(error, UserError)
            labels = "" if is_missing else _label_range(pick(targets, term.target))
            raise UserError(
                f"loss.{name}: cannot take outputs ({describe(outputs)}) with targets "
                f"({describe(targets)}{labels}): {error}{hint}"
            ) from error
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise UserError(
                f"loss.{name}: must return a floating-point tensor, the mean over the batch; it "
                f"returned {describe(value)}"
            )
        return value.mean() if value.ndim else value

    def samples_weight(self, targets: Nested) -> Tensor | None:
        """Return how many samples a batch counts for in a mean over batches.

        Args:
            targets: Targets of the batch.

        Returns:
            A scalar for a single term that does not divide by the number of samples; otherwise
            None, for the number of samples.
        """
        if len(self.terms) > 1:
            return None
        (term,) = self.terms.values()
        return term.samples_weight(targets)

    @property
    def is_torch_loss(self) -> bool:
        """Whether it is a single loss of torch, which knows nothing of sums over batches."""
        modules = [getattr(term.function, "__module__", None) for term in self.terms.values()]
        return len(modules) == 1 and str(modules[0]).startswith("torch.nn.")

    def update_weights(self, epoch: int, step: int) -> None:
        """Set the scheduled weights for the next step.

        Args:
            epoch: Current epoch, counted from 1.
            step: Next step, counted from 1.

        Raises:
            UserError: A schedule returns a value that is not finite.
        """
        for name, schedule in self.schedules.items():
            schedule.update(f"loss.{name}.weight", epoch, step)

    def scheduled_weights(self) -> dict[str, float]:
        """Return the scheduled weights as `<term>_weight`."""
        return {f"{name}_weight": schedule.value for name, schedule in self.schedules.items()}

    def learned_weights(self) -> dict[str, Tensor]:
        """Return the learned weights as `<term>_weight`, on their device."""
        return {
            f"{name}_weight": term.weight.factor
            for name, term in self.terms.items()
            if isinstance(term.weight, UncertaintyWeight)
        }


def _label_range(targets: Nested) -> str:
    """Describe the labels in targets, for the error of a loss; empty for other targets."""
    is_readable = isinstance(targets, Tensor) and targets.is_cpu and targets.numel() > 0
    if not is_readable or targets.is_floating_point():
        return ""
    return f" with labels {int(targets.min())} to {int(targets.max())}"


def as_loss(
    loss: WeightedSum | Term | LossFunction | Mapping[str, Term | LossFunction],
) -> WeightedSum:
    """Return a loss made of named terms, or of a single term named `main`."""
    if isinstance(loss, WeightedSum):
        return loss
    named = loss if isinstance(loss, Mapping) else {"main": loss}
    return WeightedSum({n: t if isinstance(t, Term) else Term(t) for n, t in named.items()})


def logit_outputs(loss: WeightedSum) -> list[Key]:
    """Return the keys of the outputs that are class logits, judging by their loss functions."""
    terms = loss.terms.values()
    return [term.output for term in terms if isinstance(term.function, LOGIT_LOSSES)]


class MeanOutputLoss(nn.Module):
    """Mean of the output, for models that return their own loss; the target is ignored."""

    def forward(self, output: Tensor, target: object) -> Tensor:  # noqa: ARG002 - losses take two
        return output.mean()
