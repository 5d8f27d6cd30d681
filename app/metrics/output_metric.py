"""A metric of one part of the outputs."""

from __future__ import annotations

from dataclasses import dataclass

from torchmetrics import Metric

from app.runtime.nested import Key


@dataclass(frozen=True)
class OutputMetric:
    """A metric together with the parts of outputs and targets that it receives.

    Attributes:
        metric: Metric that is updated with these parts.
        output: Key of the outputs; None passes all of them.
        target: Key of the targets; None passes all of them.
    """

    metric: Metric
    output: Key = None
    target: Key = None
