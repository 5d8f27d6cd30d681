"""The jobs of a search: trials of an Optuna study, and the study's search space."""

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
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.study import Study, StudyDirection
from optuna.trial import TrialState

from app.config.allowlist import PRUNER_PREFIX, SAMPLER_PREFIX
from app.config.instantiate import Instantiator
from app.config.overrides import JobValues, SweepSpace, choices, quote, raw_override
from app.config.schema import MonitorConfig, OptunaTrial
from app.config.secrets import hidden_secrets, reveal_read_secrets
from app.runtime.errors import ConfigError, ConfigIssue, UserError, did_you_mean
from app.sweep.driver import JobSource
from app.sweep.folder import SweepFolder
from app.sweep.job import SweepJob, parse_value
from app.sweep.outcome import COMPLETED, DIVERGED, FAILED, PRUNED, RunStatus, read_run_status
from app.sweep.run import Sweep
from app.sweep.search_options import GRID_SAMPLER, NO_PRUNER, SearchOptions
from app.training.history import Row, goal_value
from app.training.pruning import make_storage

log = logging.getLogger(__name__)
DIRECTIONS = {"max": StudyDirection.MAXIMIZE, "min": StudyDirection.MINIMIZE}
RETRY_OF, EXHAUSTED = "retry_of", "exhausted"  # user attributes of trials and of the study
LOG_TAG = "log"
# A diverged trial has no meaningful value, and must not be retried as a failed one is.
TRIAL_STATES = {
    PRUNED: TrialState.PRUNED,
    DIVERGED: TrialState.PRUNED,
    FAILED: TrialState.FAIL,
}


class OptunaJobs(JobSource):
    """Source of jobs that asks an Optuna study for trials, and tells it their results.

    Args:
        sweep: Configuration of the sweep.
        folder: Folder with the jobs of earlier commands.
        space: Swept keys and their values.
        options: Options of the search.
    """

    def __init__(
        self, sweep: Sweep, folder: SweepFolder, space: SweepSpace, options: SearchOptions
    ) -> None:
        super().__init__(folder, sweep.config.sweep.max_retries)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space, self.options = space, options
        self.search_space = parse_search_space(space.swept)
        goal = MonitorConfig(sweep.config.goal.metric, sweep.config.goal.mode)
        self.objectives = {goal.metric: goal, **options.objectives}
        with hidden_secrets():  # this text is saved
            storage = str(sweep.config.hydra.sweeper.storage)
        self.storage = folder.storage_name(storage)
        self.study_name = options.study_name or folder.path.name
        self.study = self._open_study()
        folder.study = {
            "storage": storage,
            "name": self.study_name,
            "objectives": list(self.objectives),
        }
        folder.save()
        self.interrupted = deque(self._interrupted_jobs())
        self._enqueue_retries()

    def _open_study(self) -> AskTellStudy:
        storage = make_storage(reveal_read_secrets(self.storage))
        exists = self.study_name in optuna.get_all_study_names(storage)
        directions = [DIRECTIONS[monitor.mode] for monitor in self.objectives.values()]
        if not exists:
            optuna.create_study(study_name=self.study_name, storage=storage, directions=directions)
        study = AskTellStudy(study_name=self.study_name, storage=storage)
        if study.directions != directions:
            saved, needed = (", ".join(d.name for d in ds) for ds in (study.directions, directions))
            problem = f"={study.study_name!r} exists with direction {saved}; this search needs"
            raise ConfigError([ConfigIssue("hydra.sweeper.study_name", f"{problem} {needed}")])
        node = sampler_node(
            self.options.sampler, self.search_space.distributions, len(study.trials)
        )
        study.sampler = Instantiator([SAMPLER_PREFIX])("hydra.sweeper.sampler", node)
        study.pruner = Instantiator([PRUNER_PREFIX])("hydra.sweeper.pruner", self.options.pruner)
        if exists:
            log.info("the study %s has %d trials", self.study_name, len(study.trials))
        return study

    def _interrupted_jobs(self) -> list[SweepJob]:
        """Report results that the study has missed, and return the jobs that did not end."""
        trials = {trial.number: trial for trial in self.study.get_trials(deepcopy=False)}
        lost = [job.number for job in self.folder.jobs if job.number not in trials]
        if lost:
            raise UserError(
                f"the study {self.study_name} in {self.storage} no longer has trial {lost[0]}, "
                f"which is a job of {self.folder.path}"
            )
        interrupted = []
        for job in self.folder.jobs:
            if trials[job.number].state is TrialState.RUNNING:
                outcome = read_run_status(self.folder.run_folder(job))
                self.on_job_end(job, outcome)
                if outcome.status != COMPLETED and outcome.status not in TRIAL_STATES:
                    interrupted.append(job)
        return interrupted

    def _enqueue_retries(self) -> None:
        """Enqueue failed trials of this folder again, up to `sweep.max_retries` times."""
        trials = self.study.get_trials(deepcopy=False)
        retried = [trial.user_attrs.get(RETRY_OF) for trial in trials]
        for job in self.folder.jobs:
            trial = trials[job.number]
            has_failed = trial.state is TrialState.FAIL and job.number not in retried
            if has_failed and self.may_retry(job):
                attributes = {RETRY_OF: job.number, "failures": job.failures}
                self.study.enqueue_trial(trial.params, user_attrs=attributes)

    def next_job(self) -> SweepJob | None:
        """Return the job of the next trial; None if there are enough."""
        if self.interrupted:
            return self.interrupted.popleft()
        waiting = self.study.get_trials(deepcopy=False, states=[TrialState.WAITING])
        num_trials = sum(job.retry_of is None for job in self.folder.jobs)
        is_enough = num_trials >= self.options.n_trials or self.study.is_exhausted
        if is_enough and not waiting:
            return None
        trial = self.study.ask(self.search_space.distributions)
        values = self.search_space.to_values(trial.params)
        job = self.folder.add(values, self.space.overrides_for(values), trial.number)
        job.failures = trial.user_attrs.get("failures", 0)
        job.retry_of = trial.user_attrs.get(RETRY_OF)
        self.folder.save()
        return job

    def extra_overrides(self, job: SweepJob) -> list[str]:
        """Return `sweep.trial`, which the run needs to prune itself; nothing without a pruner."""
        if self.options.pruner["_target_"] == NO_PRUNER:
            return []
        trial = OptunaTrial(self.storage, self.study_name, job.number, self.options.pruner)
        return [f"sweep.trial={to_override(vars(trial))}"]

    def on_job_end(self, job: SweepJob, outcome: RunStatus) -> None:
        """Tell the study the result of a trial; an interrupted one stays running there."""
        if outcome.status in TRIAL_STATES:
            self.study.tell(job.number, state=TRIAL_STATES[outcome.status])
        elif outcome.status == COMPLETED:
            values = objective_values(self.folder.run_folder(job), outcome, self.objectives)
            if any(math.isnan(value) for value in values):
                log.warning("trial %d has no value of %s", job.number, ", ".join(self.objectives))
                self.study.tell(job.number, state=TrialState.FAIL)
            else:
                self.study.tell(job.number, values)

    @property
    def batch_size(self) -> int:
        """Trials at a time."""
        return 1 if self.options.n_jobs == "auto" else self.options.n_jobs


class AskTellStudy(Study):
    """A study for ask and tell that records when its sampler has tried everything."""

    def stop(self) -> None:
        """Record that the search space is exhausted; samplers call this method."""
        self.set_user_attr(EXHAUSTED, True)

    @property
    def is_exhausted(self) -> bool:
        """Whether the sampler has tried everything, in this or an earlier process."""
        return bool(self.user_attrs.get(EXHAUSTED))


def objective_values(
    folder: Path, outcome: RunStatus, objectives: dict[str, MonitorConfig]
) -> list[float]:
    """Return the best value of the goal, and the values of the other objectives in that epoch."""
    _, *others = objectives.values()
    values = [outcome.value if outcome.value is not None else math.nan]
    if others:
        table = pd.read_csv(folder / "summary_table.csv")
        epoch = (outcome.content.get("best") or {}).get("epoch")
        rows = table[(table["stage"] == "test") | (table["epoch"] == epoch)].to_dict("records")
        for monitor in others:
            row: Row = next((r for r in reversed(rows) if r["stage"] == monitor.stage), {})
            values.append(goal_value(row, monitor) if row else math.nan)
    return values


def sampler_node(
    node: dict[str, Any], distributions: dict[str, Any], num_trials: int
) -> dict[str, Any]:
    """Complete the config node of a sampler.

    The number of trials is added to the seed, as a resumed search must not draw the same values
    again; the grid sampler gets its search space.
    """
    seed = node.get("seed")
    node = node | ({"seed": seed + num_trials} if isinstance(seed, int) else {})
    if node["_target_"] == GRID_SAMPLER:
        return node | {"search_space": {k: list(d.choices) for k, d in distributions.items()}}
    return node


def to_override(value: Any) -> str:
    """Format a value as Hydra parses it on the command line."""
    if isinstance(value, dict):
        return "{{{}}}".format(",".join(f"{key}:{to_override(v)}" for key, v in value.items()))
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(to_override, value))}]"
    if isinstance(value, str):
        return quote(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


@dataclass(frozen=True)
class SearchSpace:
    """What an Optuna study searches.

    Attributes:
        distributions: Distribution of each key.
        choice_texts: For each categorical key, the text of each choice in an override.
    """

    distributions: dict[str, BaseDistribution]
    choice_texts: dict[str, dict[Any, str]]

    def to_values(self, params: Mapping[str, Any]) -> JobValues:
        """Convert the parameters of a trial to values of overrides."""
        return {
            key: self.choice_texts[key][_typed_key(value)]
            if key in self.choice_texts
            else repr(value)
            for key, value in params.items()
        }


def parse_search_space(swept: Mapping[str, Override]) -> SearchSpace:
    """Convert swept keys to distributions.

    A `choice` is categorical; an `interval` is uniform, or log-uniform with `tag(log, ...)`; a
    `range` has the same values as in Hydra, in order.
    """
    distributions = {key: _distribution(override) for key, override in swept.items()}
    choice_texts = {
        key: {_typed_key(_choice_value(text)): text for text in choices(override)}
        for key, override in swept.items()
        if isinstance(distributions[key], CategoricalDistribution)
    }
    return SearchSpace(distributions, choice_texts)


def parse_sweep(override: Override) -> ChoiceSweep | RangeSweep | IntervalSweep:
    """Return the sweep of an override; a `glob` counts as a choice."""
    sweep = override.value()
    if isinstance(sweep, (RangeSweep, IntervalSweep)):
        return sweep
    return sweep if isinstance(sweep, ChoiceSweep) else ChoiceSweep(list=[])


def _typed_key(value: Any) -> Any:
    """A dict key that tells `True` from `1`."""
    return (type(value).__name__, value)


def _choice_value(text: str) -> Any:
    """The value of a choice; Optuna cannot store dicts and lists, so these stay texts."""
    value = parse_value(text)
    return text if isinstance(value, (dict, list)) else value


def _distribution(override: Override) -> BaseDistribution:
    sweep, texts = parse_sweep(override), choices(override)
    if isinstance(sweep, ChoiceSweep) or (isinstance(sweep, RangeSweep) and sweep.shuffle):
        return CategoricalDistribution([_choice_value(text) for text in texts])
    values: list[Any] = [parse_value(text) for text in texts]
    is_log, step = LOG_TAG in sweep.tags, None
    if isinstance(sweep, RangeSweep) and not is_log:
        step = abs(sweep.step or 1)
    if all(isinstance(value, int) for value in values):
        return IntDistribution(min(values), max(values), step=int(step or 1), log=is_log)
    return FloatDistribution(min(values), max(values), step=step, log=is_log)


def iter_distribution_issues(swept: Mapping[str, Override]) -> Iterator[ConfigIssue]:
    """Yield an issue for each swept key that cannot be converted to a distribution."""
    for key, override in swept.items():
        sweep = parse_sweep(override)
        text = f"={raw_override(override).partition('=')[2]}"
        unknown = sorted(tag for tag in sweep.tags if tag != LOG_TAG)
        if unknown:
            hint = did_you_mean(unknown[0], [LOG_TAG])
            yield ConfigIssue(key, f"{text}: unknown tag {unknown[0]!r}; allowed: log{hint}")
        elif isinstance(sweep, ChoiceSweep):
            if LOG_TAG in sweep.tags:
                yield ConfigIssue(key, f"{text}: tag log is only for interval() and range()")
        else:
            values = [parse_value(value) for value in choices(override)]
            if problem := _range_problem(sweep, values):
                yield ConfigIssue(key, f"{text}{problem}")


def _range_problem(sweep: RangeSweep | IntervalSweep, values: Sequence[Any]) -> str | None:
    is_log = LOG_TAG in sweep.tags
    if not values:
        return " has no values"
    if not all(math.isfinite(value) for value in values):
        return " is not finite"
    if isinstance(sweep, IntervalSweep):
        if values[0] > values[-1]:
            return ": the end of the interval is below its start"
    elif is_log and sweep.step not in (1, None):
        return ": a range with tag log cannot have a step"
    return ": tag log needs values above 0" if is_log and min(values) <= 0 else None
