"""All that learns: the optimizations of a task, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from app.guard import Guard, Policy
from app.optimization import Optimization
from app.training.accumulator import Mean

ONLY = ""  # the name of an optimization that has no other beside it


class Learning:
    """The optimizations of a task.

    Args:
        optimizations: By name; the names are those of parts of the model. A single one may be
            given as it is.
        on_nonfinite: What follows a loss or gradients that are no numbers; None looks at neither.
    """

    def __init__(
        self,
        optimizations: Mapping[str, Optimization] | Optimization,
        on_nonfinite: Policy | None = "stop",
    ) -> None:
        alone = isinstance(optimizations, Optimization)
        self.optimizations: dict[str, Optimization] = (
            {ONLY: optimizations} if alone else dict(optimizations)  # type: ignore[dict-item, arg-type]
        )
        first = next(iter(self.optimizations.values()))
        self.guard = Guard(on_nonfinite, first.device) if on_nonfinite else None
        for one in self.optimizations.values():
            one.guard = self.guard

    def __getitem__(self, name: str) -> Optimization:
        return self.optimizations[name]

    @property
    def only(self) -> Optimization:
        """The only one."""
        (optimization,) = self.optimizations.values()
        return optimization

    @property
    def steps(self) -> int:
        """How many steps the first optimizer has made."""
        return next(iter(self.optimizations.values())).steps

    @property
    def accumulate(self) -> int:
        """Batches to one step."""
        return next(iter(self.optimizations.values())).accumulate

    @property
    def is_between_steps(self) -> bool:
        """Whether no gradients wait for further batches."""
        return not any(one.batches for one in self.optimizations.values())

    @property
    def has_refused(self) -> bool:
        """Whether a step of the batch under way was not made, since something is no number."""
        return self.guard is not None and self.guard.refused

    @property
    def completes(self) -> bool:
        """Whether the next batch makes a step, if it is learned from once."""
        first = next(iter(self.optimizations.values()))
        return first.batches + 1 >= first.accumulate

    def rates(self) -> dict[str, float]:
        """The learning rates of the next step: `lr`, or `lr_<name>` of each."""
        return {column("lr", name): one.lr for name, one in self.optimizations.items()}

    def norms(self, count: int) -> dict[str, Mean]:
        """The norms of the gradients, where they are kept; batches without a step have none."""
        return {
            column("gradient_norm", name): _norm(one, count)
            for name, one in self.optimizations.items()
            if one.tracks_norm
        }

    def finish(self) -> None:
        """Uses what has accumulated; an epoch ends."""
        for optimization in self.optimizations.values():
            optimization.finish()

    def epoch_end(self, goal_value: float | None) -> None:
        """An epoch is over; `goal_value` is None where the goal was not measured in it."""
        for optimization in self.optimizations.values():
            optimization.schedule.epoch_end(goal_value)

    def position(self) -> dict[str, Any]:
        """How far all are."""
        return {name: one.position() for name, one in self.optimizations.items()}

    def put_back(self, position: dict[str, Any]) -> None:
        """The steps since then have not been made."""
        for name, one in self.optimizations.items():
            one.put_back(position[name])

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {name: one.state_dict() for name, one in self.optimizations.items()}

    def load_state_dict(self, state: dict[str, Any], anew: bool = False) -> None:
        """Goes on from what `state_dict` gave; `anew` as in `Optimization.load_state_dict`."""
        for name, one in self.optimizations.items():
            one.load_state_dict(state[name], anew)


def _norm(one: Optimization, count: int) -> Mean:
    if one.norm is None:
        return Mean(torch.zeros((), device=one.device), 0)
    return Mean(one.norm, 0 if one.batches else count)


def column(what: str, name: str) -> str:
    """`lr`, or `lr_generator` where there are several."""
    return f"{what}_{name}" if name else what
