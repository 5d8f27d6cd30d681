"""The jobs of a search: trials that a study of Optuna's asks for."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from omegaconf import DictConfig
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from app.config.instantiate import Instantiator
from app.config.overrides import JobValues, SweepSpace, choices, quote, raw_override
from app.config.schema import MonitorConfig
from app.runtime.errors import ConfigError, ConfigIssue, UserError, did_you_mean
from app.sweep.folder import SweepFolder
from app.sweep.job import SweepJob, parse_value
from app.sweep.outcome import COMPLETED, DIVERGED, FAILED, PRUNED, RunStatus, read_run_status
from app.sweep.run import Sweep
from app.sweep.search_options import (
    GRID_SAMPLER,
    NO_PRUNER,
    PRUNER_PREFIX,
    SAMPLER_PREFIX,
    SearchOptions,
)
from app.training.history import Row, goal_value
from app.training.pruning import make_storage

log = logging.getLogger(__name__)
DIRECTIONS = {"max": StudyDirection.MAXIMIZE, "min": StudyDirection.MINIMIZE}
RETRY_OF, EXHAUSTED = "retry_of", "exhausted"


class AskTellStudy(Study):
    """One that is asked trial by trial: a sampler that has tried everything says so here."""

    def stop(self) -> None:
        """There is nothing left to try."""
        self.set_user_attr(EXHAUSTED, True)

    @property
    def is_exhausted(self) -> bool:
        """Whether it has said so, now or in an earlier go."""
        return bool(self.user_attrs.get(EXHAUSTED))


class OptunaJobs:
    """Asks a study for trials, and tells it what became of them.

    Args:
        sweep: What was asked for.
        folder: Knows the jobs of earlier goes.
        space: What is searched.
        options: How.
    """

    def __init__(
        self, sweep: Sweep, folder: SweepFolder, space: SweepSpace, options: SearchOptions
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.sweep, self.folder, self.space, self.options = sweep, folder, space, options
        self.searched = parse_search_space(space.swept)
        self.objectives = make_objectives(sweep.config, options)
        self.storage = folder.storage_name(options.storage)
        self.name = options.study_name or folder.path.name
        self.study = self._study()
        folder.study = {
            "storage": options.storage,
            "name": self.name,
            "objectives": list(self.objectives),
        }
        folder.save()
        self.again = deque(self._cut())
        self._retry()

    def _study(self) -> AskTellStudy:
        storage = make_storage(self.storage)
        known = self.name in optuna.get_all_study_names(storage)
        directions = [DIRECTIONS[monitor.mode] for monitor in self.objectives.values()]
        if not known:
            optuna.create_study(study_name=self.name, storage=storage, directions=directions)
        study = AskTellStudy(study_name=self.name, storage=storage)
        if study.directions != directions:
            there, here = (", ".join(one.name for one in d) for d in (study.directions, directions))
            problem = f"={self.name!r} is there already, to {there}; the goals here are to {here}"
            raise ConfigError([ConfigIssue("hydra.sweeper.study_name", problem)])
        node = sampler_node(self.options.sampler, self.searched.distributions, len(study.trials))
        study.sampler = Instantiator([SAMPLER_PREFIX])("hydra.sweeper.sampler", node)
        study.pruner = Instantiator([PRUNER_PREFIX])("hydra.sweeper.pruner", self.options.pruner)
        if known:
            log.info("the study %s has %d trials", self.name, len(study.trials))
        return study

    def _cut(self) -> list[SweepJob]:
        """Those of this folder that were under way when it ended."""
        trials = {trial.number: trial for trial in self.study.get_trials(deepcopy=False)}
        lost = [job.number for job in self.folder.jobs if job.number not in trials]
        if lost:
            raise UserError(
                f"the study {self.name} in {self.storage} has no trial {lost[0]} any more"
            )
        running = [j for j in self.folder.jobs if trials[j.number].state is TrialState.RUNNING]
        outcomes = {job.number: read_run_status(self.folder.run_folder(job)) for job in running}
        for job in running:  # the study had no time to hear of these
            self.on_job_end(job, outcomes[job.number])
        ended = (COMPLETED, DIVERGED, PRUNED, FAILED)
        return [job for job in running if outcomes[job.number].status not in ended]

    def _retry(self) -> None:
        """Failed trials are drawn again, unless they have been often enough."""
        trials = self.study.get_trials(deepcopy=False)
        own = {job.number: job for job in self.folder.jobs}
        retried = [trial.user_attrs.get(RETRY_OF) for trial in trials]
        for trial in trials:
            failed = trial.number in own and trial.state is TrialState.FAIL
            if failed and trial.number not in retried:
                self._draw_again(trial, own[trial.number].failures)

    def _draw_again(self, trial: FrozenTrial, failures: int) -> None:
        limit = self.sweep.config.sweep.max_retries
        if failures > limit:
            words = "trial %d has failed %d times and is left alone (sweep.max_retries=%d)"
            log.warning(words, trial.number, failures, limit)
        else:
            attributes = {RETRY_OF: trial.number, "failures": failures}
            self.study.enqueue_trial(trial.params, user_attrs=attributes)

    def next_job(self) -> SweepJob | None:
        """The next trial; None where there are enough."""
        if self.again:
            return self.again.popleft()
        waiting = self.study.get_trials(deepcopy=False, states=[TrialState.WAITING])
        own = sum(job.retry_of is None for job in self.folder.jobs)
        enough = own >= self.options.n_trials or self.study.is_exhausted
        if enough and not waiting:
            return None
        trial = self.study.ask(self.searched.distributions)
        values = self.searched.to_values(trial.params)
        job = self.folder.add(values, self.space.overrides_for(values), trial.number)
        job.failures = trial.user_attrs.get("failures", 0)
        job.retry_of = trial.user_attrs.get(RETRY_OF)
        self.folder.save()
        return job

    def extra_overrides(self, job: SweepJob) -> list[str]:
        """Which trial it is, where it may be pruned."""
        if self.options.pruner["_target_"] == NO_PRUNER:
            return []
        trial = {
            "storage": self.storage,
            "study": self.name,
            "number": job.number,
            "pruner": self.options.pruner,
        }
        return [f"sweep.trial={to_override(trial)}"]

    def on_job_end(self, job: SweepJob, outcome: RunStatus) -> None:
        """The study hears of it; what was cut stays under way."""
        if outcome.status == COMPLETED:
            values = objective_values(self.folder.run_folder(job), outcome, self.objectives)
            if any(math.isnan(value) for value in values):
                log.warning("trial %d has no value of %s", job.number, ", ".join(self.objectives))
                self.study.tell(job.number, state=TrialState.FAIL)
            else:
                self.study.tell(job.number, values)
        elif outcome.status in (PRUNED, DIVERGED, FAILED):
            over = TrialState.PRUNED  # not to be drawn again, and no value to be proud of
            states = {PRUNED: over, DIVERGED: over, FAILED: TrialState.FAIL}
            self.study.tell(job.number, state=states[outcome.status])

    def batch_size(self, launcher: object) -> int:  # noqa: ARG002
        """As many as are asked for; one by one in this process, and the pool fills its slots."""
        return 1 if self.options.n_jobs == "auto" else self.options.n_jobs


def make_objectives(config: DictConfig, options: SearchOptions) -> dict[str, MonitorConfig]:
    """By name the goal, and what else is searched for."""
    goal = MonitorConfig(config.goal.metric, config.goal.mode)
    return {goal.metric: goal} | {
        name: MonitorConfig(**one) for name, one in options.objectives.items()
    }


def objective_values(
    folder: Path, outcome: RunStatus, objectives: dict[str, MonitorConfig]
) -> list[float]:
    """The goal's best value, and those of the others in the epoch that had it."""
    _, *others = objectives.values()
    best = outcome.content.get("best") or {}
    values = [outcome.value if outcome.value is not None else math.nan]
    if others:
        table = pd.read_csv(folder / "summary_table.csv")
        for monitor in others:
            rows = table[table["stage"] == monitor.stage]
            rows = rows if monitor.stage == "test" else rows[rows["epoch"] == best.get("epoch")]
            row: Row = {str(k): v for k, v in rows.iloc[-1].items()} if len(rows) else {}
            values.append(goal_value(row, monitor) if row else math.nan)
    return values


def sampler_node(
    node: dict[str, Any], distributions: dict[str, Any], trials: int
) -> dict[str, Any]:
    """The sampler, with what it needs to know; going on, it must not draw the same again."""
    seed = node.get("seed")
    node = node | ({"seed": seed + trials} if isinstance(seed, int) else {})
    if node["_target_"] == GRID_SAMPLER:
        return node | {"search_space": {k: list(d.choices) for k, d in distributions.items()}}
    return node


def to_override(value: Any) -> str:
    """A value as Hydra reads it from a command line."""
    if isinstance(value, dict):
        return "{{{}}}".format(",".join(f"{key}:{to_override(one)}" for key, one in value.items()))
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(to_override, value))}]"
    if isinstance(value, str):
        return quote(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


LOG_TAG = "log"


@dataclass(frozen=True)
class SearchSpace:
    """What is searched.

    Attributes:
        distributions: By key.
        words: By key and value of a choice, how it is typed.
    """

    distributions: dict[str, BaseDistribution]
    choice_texts: dict[str, dict[Any, str]]

    def to_values(self, drawn: Mapping[str, Any]) -> JobValues:
        """What was drawn, as it would be typed."""
        return {
            key: self.choice_texts[key][_hashed(value)] if key in self.choice_texts else repr(value)
            for key, value in drawn.items()
        }


def parse_search_space(swept: Mapping[str, Override]) -> SearchSpace:
    """The distributions of swept keys.

    A `choice` is categorical; an `interval` is drawn from evenly, by `tag(log, ...)` evenly in its
    logarithm; a `range` has the values that Hydra gives it, in their order.
    """
    words = {
        key: {_hashed(_value(text)): text for text in choices(override)}
        for key, override in swept.items()
        if _is_choice(override)
    }
    return SearchSpace({key: _distribution(one) for key, one in swept.items()}, words)


def _is_choice(override: Override) -> bool:
    sweep = parse_sweep(override)
    return sweep.shuffle if isinstance(sweep, RangeSweep) else isinstance(sweep, ChoiceSweep)


def parse_sweep(override: Override) -> ChoiceSweep | RangeSweep | IntervalSweep:
    """Its value, with what `glob(*)` stands for as choices."""
    sweep = override.value()
    if isinstance(sweep, (RangeSweep, IntervalSweep)):
        return sweep
    return sweep if isinstance(sweep, ChoiceSweep) else ChoiceSweep(list=[])


def _hashed(value: Any) -> Any:
    """`True` and `1` are two choices."""
    return (type(value).__name__, value)


def _value(text: str) -> Any:
    value = parse_value(text)
    return text if isinstance(value, (dict, list)) else value


def _distribution(override: Override) -> BaseDistribution:
    sweep = parse_sweep(override)
    if isinstance(sweep, ChoiceSweep) or _is_choice(override):
        return CategoricalDistribution([_value(text) for text in choices(override)])
    log = LOG_TAG in sweep.tags
    if isinstance(sweep, IntervalSweep):
        assert sweep.start is not None and sweep.end is not None
        if isinstance(sweep.start, int) and isinstance(sweep.end, int):
            return IntDistribution(sweep.start, sweep.end, log=log)
        return FloatDistribution(sweep.start, sweep.end, log=log)
    values = [parse_value(text) for text in choices(override)]
    low, high = min(values), max(values)
    step: Any = abs(sweep.step or 1)
    if all(isinstance(value, int) for value in values):
        return IntDistribution(low, high, step=step, log=log)
    return FloatDistribution(low, high, step=None if log else step, log=log)


def iter_distribution_issues(swept: Mapping[str, Override]) -> Iterator[ConfigIssue]:
    """What no distribution can be made of."""
    for key, override in swept.items():
        sweep = parse_sweep(override)
        text = f"={raw_override(override).partition('=')[2]}"
        wrong = sorted(tag for tag in sweep.tags if tag != LOG_TAG)
        if wrong:
            close = did_you_mean(wrong[0], [LOG_TAG])
            yield ConfigIssue(
                key, f"{text}: {wrong[0]!r} is no tag known here; allowed: log{close}"
            )
        elif isinstance(sweep, ChoiceSweep):
            if LOG_TAG in sweep.tags:
                yield ConfigIssue(key, f"{text}: log is for interval() and range()")
        else:
            values = [parse_value(one) for one in choices(override)]
            if problem := _range_problem(sweep, values):
                yield ConfigIssue(key, f"{text}{problem}")


def _range_problem(sweep: RangeSweep | IntervalSweep, values: Sequence[Any]) -> str | None:
    log = LOG_TAG in sweep.tags
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
