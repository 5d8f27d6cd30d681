"""Hydra's sweeps as distributions of Optuna's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from app.config.overrides import Values, choices_of, line_of
from app.runtime.errors import Mistake, nearest
from app.sweep.job import plain_value

LOG = "log"


@dataclass(frozen=True)
class Searched:
    """What is searched.

    Attributes:
        distributions: By key.
        words: By key and value of a choice, how it is typed.
    """

    distributions: dict[str, BaseDistribution]
    words: dict[str, dict[Any, str]]

    def typed(self, drawn: Mapping[str, Any]) -> Values:
        """What was drawn, as it would be typed."""
        return {
            key: self.words[key][_hashed(value)] if key in self.words else repr(value)
            for key, value in drawn.items()
        }


def searched(swept: Mapping[str, Override]) -> Searched:
    """The distributions of swept keys.

    A `choice` is categorical; an `interval` is drawn from evenly, by `tag(log, ...)` evenly in its
    logarithm; a `range` has the values that Hydra gives it, in their order.
    """
    words = {
        key: {_hashed(_value(text)): text for text in choices_of(override)}
        for key, override in swept.items()
        if _is_choice(override)
    }
    return Searched({key: _distribution(one) for key, one in swept.items()}, words)


def _is_choice(override: Override) -> bool:
    sweep = sweep_of(override)
    return sweep.shuffle if isinstance(sweep, RangeSweep) else isinstance(sweep, ChoiceSweep)


def sweep_of(override: Override) -> ChoiceSweep | RangeSweep | IntervalSweep:
    """Its value, with what `glob(*)` stands for as choices."""
    sweep = override.value()
    if isinstance(sweep, (RangeSweep, IntervalSweep)):
        return sweep
    return sweep if isinstance(sweep, ChoiceSweep) else ChoiceSweep(list=[])


def _hashed(value: Any) -> Any:
    """`True` and `1` are two choices."""
    return (type(value).__name__, value)


def _value(text: str) -> Any:
    value = plain_value(text)
    return text if isinstance(value, (dict, list)) else value


def _distribution(override: Override) -> BaseDistribution:
    sweep = sweep_of(override)
    if isinstance(sweep, ChoiceSweep) or _is_choice(override):
        return CategoricalDistribution([_value(text) for text in choices_of(override)])
    log = LOG in sweep.tags
    if isinstance(sweep, IntervalSweep):
        assert sweep.start is not None and sweep.end is not None
        if isinstance(sweep.start, int) and isinstance(sweep.end, int):
            return IntDistribution(sweep.start, sweep.end, log=log)
        return FloatDistribution(sweep.start, sweep.end, log=log)
    values = [plain_value(text) for text in choices_of(override)]
    low, high = min(values), max(values)
    step: Any = abs(sweep.step or 1)
    if all(isinstance(value, int) for value in values):
        return IntDistribution(low, high, step=step, log=log)
    return FloatDistribution(low, high, step=None if log else step, log=log)


def distribution_mistakes(swept: Mapping[str, Override]) -> Iterator[Mistake]:
    """What no distribution can be made of."""
    for key, override in swept.items():
        sweep = sweep_of(override)
        text = f"={line_of(override).partition('=')[2]}"
        wrong = sorted(tag for tag in sweep.tags if tag != LOG)
        if wrong:
            close = nearest(wrong[0], [LOG])
            yield Mistake(key, f"{text}: {wrong[0]!r} is no tag known here; allowed: log{close}")
        elif isinstance(sweep, ChoiceSweep):
            if LOG in sweep.tags:
                yield Mistake(key, f"{text}: log is for interval() and range()")
        else:
            values = [plain_value(one) for one in choices_of(override)]
            if problem := _range_problem(sweep, values):
                yield Mistake(key, f"{text}{problem}")


def _range_problem(sweep: RangeSweep | IntervalSweep, values: Sequence[Any]) -> str | None:
    log = LOG in sweep.tags
    if not values:
        return " has no value"
    if not all(math.isfinite(value) for value in values):
        return " has no end"
    if isinstance(sweep, IntervalSweep):
        if values[0] > values[-1]:
            return " ends below its beginning"
    elif log and sweep.step not in (1, None):
        return ": with log a range has no step"
    return ": a logarithm needs values above 0" if log and min(values) <= 0 else None
