"""Parse command-line overrides, and expand the swept ones to the values of each job."""

from __future__ import annotations

import itertools
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException

from app.config.habits import WORDS
from app.config.limits import override_problem
from app.config.resolvers import escape_interpolations
from app.runtime.errors import ConfigError, ConfigIssue, did_you_mean, join_choices

MAX_SWEEP_VALUES = 100_000  # of a range, and jobs of a grid
JobValues = dict[str, str]  # swept key -> value, as written in an override


@dataclass(frozen=True)
class SweepSpace:
    """Overrides of a sweep, and the values of those that are swept.

    Attributes:
        overrides: The last override of each key, in the order in which keys first appear.
    """

    overrides: tuple[Override, ...]

    @cached_property
    def swept(self) -> dict[str, Override]:
        """Overrides with several values, by key as written (`+` included)."""
        return {o.get_key_element(): o for o in self.overrides if o.is_sweep_override()}

    @property
    def fixed(self) -> list[str]:
        """Overrides that all jobs share."""
        return [raw_override(o) for o in self.overrides if not o.is_sweep_override()]

    def overrides_for(self, values: Mapping[str, str]) -> list[str]:
        """Overrides of one job, in the original order."""
        return [
            f"{key}={values[key]}" if (key := o.get_key_element()) in values else raw_override(o)
            for o in self.overrides
        ]

    def coverage_jobs(self) -> list[list[str]]:
        """Overrides of jobs that together use each value once; of a range only its two ends."""
        values_by_key = {key: _coverage_values(override) for key, override in self.swept.items()}
        first = {key: values[0] for key, values in values_by_key.items()}
        others = [first | {key: v} for key, values in values_by_key.items() for v in values[1:]]
        return [self.overrides_for(values) for values in (first, *others)]


def _coverage_values(override: Override) -> list[str]:
    values = choices(override)
    return [values[0], values[-1]] if isinstance(override.value(), RangeSweep) else values


def parse_space(
    overrides: Sequence[str], params: Mapping[str, object], loader: ConfigLoader | None = None
) -> SweepSpace:
    """Parse overrides and `hydra.sweeper.params`; an override takes precedence over a parameter.

    Args:
        overrides: Overrides from the command line.
        params: Swept values by key, written as in an override.
        loader: Knows the options that `glob(*)` expands to.

    Raises:
        ConfigError: An override cannot be parsed.
    """
    return make_space(parse_overrides(overrides, loader), params, loader)


def make_space(
    overrides: Sequence[Override],
    params: Mapping[str, object],
    loader: ConfigLoader | None = None,
) -> SweepSpace:
    """Combine overrides and `hydra.sweeper.params` as `parse_space` does."""
    defaults = parse_overrides([f"{key}={value}" for key, value in params.items()], loader)
    last = {override.get_key_element(): override for override in [*defaults, *overrides]}
    return SweepSpace(tuple(last.values()))


def parse_overrides(texts: Sequence[str], loader: ConfigLoader | None = None) -> list[Override]:
    """Parse overrides with Hydra.

    Raises:
        ConfigError: Lists every override that cannot be parsed.
    """
    spaced, texts = _split_at_spaces(texts)
    issues = [ConfigIssue(f"{text}", " must be typed without spaces around =") for text in spaced]
    parsed = []
    for text in texts:
        if (problem := override_problem(text)) is not None:
            issues.append(ConfigIssue(f"{text[:40]}...", problem))
            continue
        try:
            parsed.append(replace(_parse(text), config_loader=loader))
            if not _is_short_range(parsed[-1]):
                problem = f" is a range without an end, or of more than {MAX_SWEEP_VALUES:,} values"
                issues.append(ConfigIssue(text, problem))
            elif _is_empty_sweep(parsed[-1]):
                issues.append(ConfigIssue(text, " has no values to sweep over"))
        except HydraException as error:
            issues.append(ConfigIssue(text, _problem(text, error)))
    if issues:
        raise ConfigError(issues)
    return parsed


def _split_at_spaces(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the `key = value` that a shell has split into several texts, and the other texts."""
    spaced, others = [], list(texts)
    while "=" in others[1:]:
        index = others.index("=", 1)
        spaced.append(" ".join(others[index - 1 : index + 2]))
        del others[index - 1 : index + 2]
    return spaced, others


def _problem(text: str, error: HydraException) -> str:
    """Return why Hydra cannot parse an override, and what to type instead."""
    if (word := text.lower()) in WORDS:
        return f" is not key=value; did you mean {WORDS[word]}?"
    if "=" not in text and "~" not in text:
        return " is not key=value; for example: model=lenet trainer.max_epochs=3"
    if any(text.count(mark) % 2 for mark in "'\""):
        return f" has a quote that is not closed{_quoting_hint(text)}"
    reason = str(error).splitlines()[0]
    reason = "" if reason.endswith((text, f"'{text}'")) else f": {reason}"  # it says no more
    return f" cannot be read as key=value{reason}{_quoting_hint(text)}"


@lru_cache(maxsize=1_000)
def _parse(text: str) -> Override:
    (override,) = OverridesParser.create().parse_overrides([text])
    return override


def _is_short_range(override: Override) -> bool:
    sweep = override.value()
    if not isinstance(sweep, RangeSweep):
        return True
    assert sweep.start is not None
    assert sweep.stop is not None
    try:
        return abs((sweep.stop - sweep.start) / sweep.step) <= MAX_SWEEP_VALUES
    except (ZeroDivisionError, OverflowError):
        return False


def _is_empty_sweep(override: Override) -> bool:
    """Return whether a range has no values, or a pattern matches no option."""
    if not override.is_discrete_sweep():
        return False
    is_pattern = isinstance(override._value, Glob)
    if is_pattern and override.config_loader is None:
        return False
    return next(override.sweep_string_iterator(), None) is None


def _quoting_hint(text: str) -> str:
    """Return how to type a value with special characters, if quoting it helps."""
    key, equals, value = text.partition("=")
    try:
        _parse(f"{key}=1")
    except HydraException:
        return ""
    typed = f"{key}={quote(value)}"
    return f"; to use the value as it is, type {quote_for_shell(typed)}" if equals else ""


def quote_for_shell(override: str) -> str:
    """Quote an override for a POSIX shell, in double quotes if possible: it has single ones."""
    if re.search(r"[!\n]", override):
        return shlex.quote(override)
    escaped = re.sub(r'(["$`\\])', r"\\\1", override)
    return f'"{escaped}"'


def raw_override(override: Override) -> str:
    """Return an override as it was written."""
    assert override.input_line is not None
    return override.input_line


def is_overridden(key: str, overrides: Sequence[Override]) -> bool:
    """Return whether an override sets the key, one of its parents or one of its children."""
    keys = [override.key_or_group for override in overrides]
    return any(f"{key}.".startswith(f"{other}.") or other.startswith(f"{key}.") for other in keys)


def quote(text: str) -> str:
    """Quote a string so that Hydra reads it as it is."""
    text = escape_interpolations(text)
    escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text)
    return f"'{escaped}'"


def choices(override: Override) -> list[str]:
    """Values of a swept override as written; of an interval only its two ends."""
    if override.is_discrete_sweep():
        return [str(value) for value in override.sweep_string_iterator()]
    sweep = override.value()
    assert isinstance(sweep, IntervalSweep)
    return [str(sweep.start), str(sweep.end)]


def grid(space: SweepSpace, zip_groups: Sequence[Sequence[str]]) -> list[JobValues]:
    """Return the values of every job: all combinations, with the last key varying fastest.

    Args:
        space: Sweep whose swept keys all have lists of values.
        zip_groups: Groups of keys that vary together, like `zip` of their values.
    """
    values_by_key = {key: choices(override) for key, override in space.swept.items()}
    zip_groups = _match_prefixes(space, zip_groups)
    axes: list[list[JobValues]] = []
    for key, values in values_by_key.items():
        group = next((keys for keys in zip_groups if key in keys), [key])
        if key == group[0]:
            rows = zip(*(values_by_key[name] for name in group), strict=True)
            axes.append([dict(zip(group, row, strict=True)) for row in rows])
        else:
            assert len(values) == len(values_by_key[group[0]])
    return [
        {key: value for values in combination for key, value in values.items()}
        for combination in itertools.product(*axes)
    ]


def grid_issues(space: SweepSpace, zip_groups: Sequence[Sequence[str]]) -> list[ConfigIssue]:
    """Return why swept keys have no list of values, or cannot vary together."""
    issues = [
        ConfigIssue(
            key,
            f"={raw_override(override).partition('=')[2]} is an interval, not a list of values; "
            "it needs hydra/sweeper=optuna",
        )
        for key, override in space.swept.items()
        if not override.is_discrete_sweep()
    ]
    seen: list[str] = []
    zip_groups = _match_prefixes(space, zip_groups)
    for group in zip_groups:
        for key in group:
            if key not in space.swept:
                swept = join_choices(space.swept)
                close = did_you_mean(key, space.swept)
                problem = f" names {key!r}, which is not swept; swept: {swept}{close}"
                issues.append(ConfigIssue("sweep.together", problem))
            elif key in seen:
                issues.append(ConfigIssue("sweep.together", f" names {key!r} twice"))
            seen.append(key)
    if not issues:
        issues += [issue for group in zip_groups for issue in _length_issues(space, group)]
    if not issues:
        dependent = [key for group in zip_groups for key in group[1:]]
        counts = [len(choices(o)) for key, o in space.swept.items() if key not in dependent]
        if (count := math.prod(counts)) > MAX_SWEEP_VALUES:
            problem = f"has {count:,} jobs; allowed: {MAX_SWEEP_VALUES:,}"
            issues.append(ConfigIssue("the sweep", f" {problem}"))
    return issues


def _match_prefixes(space: SweepSpace, groups: Sequence[Sequence[str]]) -> list[list[str]]:
    """Give the keys of each group the `+` that their overrides have."""
    keys = {key.lstrip("+"): key for key in space.swept}
    return [[keys.get(key.lstrip("+"), key) for key in group] for group in groups]


def _length_issues(space: SweepSpace, group: Sequence[str]) -> list[ConfigIssue]:
    counts = {key: len(choices(space.swept[key])) for key in group}
    if len({*counts.values()}) <= 1:
        return []
    summary = ", ".join(f"{key} has {count} values" for key, count in counts.items())
    return [ConfigIssue("sweep.together", f": {summary}; the numbers must be equal")]
