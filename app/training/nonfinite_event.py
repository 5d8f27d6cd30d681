"""What is reported about a step whose loss or gradients are NaN or infinite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MAX_SHOWN_SAMPLES = 8  # sample indices in messages


@dataclass(frozen=True)
class NonFiniteEvent:
    """A step whose loss or gradients are NaN or infinite.

    Attributes:
        stage: `train`, `valid` or `test`.
        epoch: Counted from 1.
        step: Number of the batch in the epoch, counted from 1.
        global_step: Number of the batch in the run, counted from 1; None in evaluation.
        rank: Rank whose part of the batch it was; None if unknown.
        kind: `loss` or `gradient`, whichever was not finite first; None if unknown.
        where: Module, parameter or gradient that it comes from; None if unknown.
        samples: Dataset indices of the batch; None if unknown.
    """

    stage: str
    epoch: int
    step: int
    global_step: int | None = None
    rank: int | None = None
    kind: str | None = None
    where: str | None = None
    samples: list[int] | None = None

    def __str__(self) -> str:
        total = f" (step {self.global_step} of the run)" if self.global_step else ""
        on_rank = f", rank {self.rank}" if self.rank is not None else ""
        where = f"; it comes from {self.where}" if self.where else ""
        text = (
            f"the {self.kind or 'loss or a gradient'} is not finite in {self.stage}, "
            f"epoch {self.epoch}, step {self.step}{total}{on_rank}{where}"
        )
        shown = ", ".join(map(str, (self.samples or [])[:MAX_SHOWN_SAMPLES]))
        more = ", ..." if len(self.samples or []) > MAX_SHOWN_SAMPLES else ""
        return text + (f"; samples {shown}{more}" if shown else "")


@dataclass
class NonFiniteStats:
    """Counts of non-finite steps, as in `status.json`.

    Attributes:
        count: Number of non-finite steps in all stages.
        skipped: Number of training steps that were skipped.
        first: Fields of the first event.
    """

    count: int = 0
    skipped: int = 0
    first: dict[str, Any] | None = None

    def add(self, event: NonFiniteEvent, count: int = 1) -> None:
        """Count `count` steps, the first of which is `event`."""
        self.count += count
        self.first = self.first or vars(event)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_dict(self, values: dict[str, Any]) -> None:
        """Restore the values that `to_dict` returned."""
        self.count, self.skipped, self.first = values["count"], values["skipped"], values["first"]
