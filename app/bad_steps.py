"""Steps whose loss or gradients were no numbers, as people and programs read of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SHOWN = 8  # indices of samples at most, in words


@dataclass(frozen=True)
class Bad:
    """A step that was no number; `step` counts batches of the epoch from 1, `global_step` all."""

    stage: str
    epoch: int
    step: int
    global_step: int | None = None
    rank: int | None = None
    kind: str = "loss"
    where: str | None = None
    samples: list[int] | None = None

    def __str__(self) -> str:
        total = f" (step {self.global_step} of the run)" if self.global_step else ""
        words = [f"the {self.kind} is no number in {self.stage}, epoch {self.epoch}, step "]
        words += [f"{self.step}{total}", f", rank {self.rank}" if self.rank is not None else ""]
        words += [f"; it comes from {self.where}" if self.where else ""]
        shown = ", ".join(map(str, (self.samples or [])[:SHOWN]))
        more = ", ..." if len(self.samples or []) > SHOWN else ""
        return "".join(words) + (f"; samples {shown}{more}" if shown else "")


@dataclass
class Record:
    """What `status.json` says of it.

    Attributes:
        count: Steps of any stage that were no numbers.
        skipped: Steps of training that were left out.
        first: Of them all.
    """

    count: int = 0
    skipped: int = 0
    first: dict[str, Any] | None = None

    def add(self, bad: Bad, count: int = 1) -> None:
        """So many, that one the first of them."""
        self.count += count
        self.first = self.first or vars(bad)

    def plain(self) -> dict[str, Any]:
        """As plain values."""
        return dict(vars(self))

    def take_up(self, plain: dict[str, Any]) -> None:
        """Goes on from what `plain` gave."""
        self.count, self.skipped, self.first = plain["count"], plain["skipped"], plain["first"]
