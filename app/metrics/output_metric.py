"""A metric together with the parts of outputs and targets that it is fed."""

from __future__ import annotations

from dataclasses import dataclass

from torchmetrics import Metric

from app.runtime.nested import Key


@dataclass(frozen=True)
class OutputMetric:
    """A metric of one part of the outputs.

    Attributes:
        metric: Fed that part and its target.
        output: Which part of the outputs; None feeds them whole.
        target: Which part of the targets; None feeds them whole.
    """

    metric: Metric
    output: Key = None
    target: Key = None
