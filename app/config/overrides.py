"""Which keys a command line sweeps over, and the values of each job."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException

from app.config.limits import word_problem
from app.runtime.errors import ConfigError, ConfigIssue, nearest, one_of

Values = dict[str, str]  # by swept key, as they would be typed


@dataclass(frozen=True)
class SweepSpace:
    """What is typed, and what of it is swept.

    Attributes:
        overrides: The last one of each key, in the order in which keys came.
    """

    overrides: tuple[Override, ...]

    @cached_property
    def swept(self) -> dict[str, Override]:
        """Those with several values, by key as it is typed (`+` included)."""
        return {o.get_key_element(): o for o in self.overrides if o.is_sweep_override()}

    @property
    def fixed(self) -> list[str]:
        """The words that all jobs share."""
        return [raw_override(o) for o in self.overrides if not o.is_sweep_override()]

    def overrides_for(self, values: Mapping[str, str]) -> list[str]:
        """The words of one job, in the order typed."""
        return [
            f"{key}={values[key]}" if (key := o.get_key_element()) in values else raw_override(o)
            for o in self.overrides
        ]

    def coverage_jobs(self) -> list[list[str]]:
        """The words of jobs that together have each value once; the ends, where it is a range."""
        choices = {key: _probed(override) for key, override in self.swept.items()}
        first = {key: values[0] for key, values in choices.items()}
        others = [first | {key: v} for key, values in choices.items() for v in values[1:]]
        return [self.overrides_for(values) for values in (first, *others)]


def parse_space(
    words: Sequence[str], params: Mapping[str, object], loader: ConfigLoader | None = None
) -> SweepSpace:
    """What those words and `hydra.sweeper.params` say; a word wins over a parameter.

    Args:
        words: As typed.
        params: By key the values, as they would be typed.
        loader: Knows the options that `glob(*)` stands for.

    Raises:
        ConfigError: Words that cannot be read.
    """
    given = [*(f"{key}={value}" for key, value in params.items()), *words]
    overrides = parse_overrides(given, loader)
    last = {override.get_key_element(): override for override in overrides}
    return SweepSpace(tuple(last.values()))


def parse_overrides(words: Sequence[str], loader: ConfigLoader | None = None) -> list[Override]:
    """The overrides as Hydra reads them; a `ConfigError` names each that it cannot read."""
    mistakes, parsed = [], []
    parser = OverridesParser.create(config_loader=loader)
    for word in words:
        if (problem := word_problem(word)) is not None:
            mistakes.append(ConfigIssue(f"{word[:40]}...", problem))
            continue
        try:
            parsed += parser.parse_overrides([word])
        except HydraException as error:
            reason = str(error).splitlines()[0]
            mistakes.append(ConfigIssue(word, f" cannot be read as key=value: {reason}"))
    if mistakes:
        raise ConfigError(mistakes)
    return parsed


def grid(space: SweepSpace, zip_groups: Sequence[Sequence[str]]) -> list[Values]:
    """The values of every job: all combinations, the last key varying fastest.

    Args:
        space: Whose swept keys have a list of values each.
        zip_groups: Groups of keys that vary together, the first values with the first.
    """
    lists = {key: choices(override) for key, override in space.swept.items()}
    axes: list[list[Values]] = []
    for key, values in lists.items():
        group = next((keys for keys in _typed_so(space, zip_groups) if key in keys), [key])
        if key == group[0]:
            rows = zip(*(lists[one] for one in group), strict=True)
            axes.append([dict(zip(group, row, strict=True)) for row in rows])
        else:
            assert len(values) == len(lists[group[0]])
    return [
        {key: value for values in combination for key, value in values.items()}
        for combination in itertools.product(*axes)
    ]


def grid_issues(space: SweepSpace, together: Sequence[Sequence[str]]) -> list[ConfigIssue]:
    """Why these are no lists of values, or cannot vary together."""
    mistakes = [
        ConfigIssue(
            key,
            f"={raw_override(override).partition('=')[2]} has no list of values; "
            "it needs hydra/sweeper=optuna",
        )
        for key, override in space.swept.items()
        if not override.is_discrete_sweep()
    ]
    seen: list[str] = []
    together = _typed_so(space, together)
    for group in together:
        for key in group:
            if key not in space.swept:
                near = nearest(key, space.swept)
                problem = f" names {key!r}, which is not swept; swept: {one_of(space.swept)}{near}"
                mistakes.append(ConfigIssue("sweep.together", problem))
            elif key in seen:
                mistakes.append(ConfigIssue("sweep.together", f" names {key!r} twice"))
            seen.append(key)
    if not mistakes:
        mistakes += [m for group in together for m in _uneven(space, group)]
    return mistakes


def _typed_so(space: SweepSpace, together: Sequence[Sequence[str]]) -> list[list[str]]:
    """With the `+` that a key was typed with."""
    typed = {key.lstrip("+"): key for key in space.swept}
    return [[typed.get(key.lstrip("+"), key) for key in group] for group in together]


def _uneven(space: SweepSpace, group: Sequence[str]) -> list[ConfigIssue]:
    counts = {key: len(choices(space.swept[key])) for key in group}
    if len({*counts.values()}) <= 1:
        return []
    told = ", ".join(f"{key} has {count} values" for key, count in counts.items())
    return [ConfigIssue("sweep.together", f": {told}; as many of each are needed")]


def choices(override: Override) -> list[str]:
    """The values of a sweep, as they would be typed; its ends where it is an interval."""
    if override.is_discrete_sweep():
        return [str(value) for value in override.sweep_string_iterator()]
    sweep = override.value()
    assert isinstance(sweep, IntervalSweep)
    return [str(sweep.start), str(sweep.end)]


def _probed(override: Override) -> list[str]:
    values = choices(override)
    return [values[0], values[-1]] if isinstance(override.value(), RangeSweep) else values


def quoted(text: str) -> str:
    """A text as Hydra reads it, whatever is in it."""
    doubled = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text)
    return f"'{doubled}'"


def raw_override(override: Override) -> str:
    """As it was typed."""
    assert override.input_line is not None
    return override.input_line
