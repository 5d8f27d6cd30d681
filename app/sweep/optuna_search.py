"""The jobs of a search: trials of an Optuna study, and the study's search space."""

from __future__ import annotations

import logging
import math
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, NopPruner
from optuna.samplers import BaseSampler, GPSampler, TPESampler
from optuna.trial import TrialState

from app.config.instantiate import Instantiator
from app.config.overrides import JobValues, SweepSpace, choices, quote, raw_override
from app.config.schema import MonitorConfig, OptunaTrial
from app.config.secrets import reveal_text
from app.runtime.errors import ConfigError, ConfigIssue, UserError, did_you_mean
from app.sweep.driver import JobSource
from app.sweep.folder import SweepFolder
from app.sweep.job import SweepJob, parse_value
from app.sweep.outcome import COMPLETED, RunStatus, read_run_status
from app.sweep.run import Sweep
from app.sweep.search_options import NO_PRUNER, OWN_STORAGES, SearchOptions
from app.sweep.study import (
    DIRECTIONS,
    RETRY_OF,
    TRIAL_STATES,
    AskTellStudy,
    create_study,
    parse_choice,
    replay_jobs,
    study_record,
    tell_result,
)
from app.training.pruning import make_storage

log = logging.getLogger(__name__)
LOG_TAG = "log"
# They see all trials whenever they are asked, and asking them for old ones would be slow.
STATELESS_SAMPLERS = (TPESampler, GPSampler)


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
        super().__init__(folder, space, sweep.config.sweep.max_retries)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.simplefilter("ignore", ExperimentalWarning)
        self.options = options
        self.search_space = parse_search_space(space.swept)
        goal = MonitorConfig(sweep.config.goal.metric, sweep.config.goal.mode)
        self.objectives = {goal.metric: goal, **options.objectives}
        self.storage = folder.storage_name(str(sweep.config.hydra.sweeper.storage))
        self.study_name = options.study_name or folder.path.name
        self.study = self._make_study() if options.storage in OWN_STORAGES else self._load_study()
        num_trials = len(self.study.trials)
        self.study.sampler, self.study.pruner = self._make_sampler(num_trials), self._make_pruner()
        if num_trials:
            log.info("the study %s has %d trials", self.study_name, num_trials)
        folder.study = study_record(self.objectives, self.search_space.distributions)
        folder.save()
        self.interrupted = deque(self._interrupted_jobs())
        self._enqueue_retries()

    def _make_study(self) -> AskTellStudy:
        """Make the study from the jobs, and save it in a new database in the sweep's folder.

        Raises:
            UserError: The jobs are not those of a search.
        """
        if [job.number for job in self.folder.jobs] != list(range(len(self.folder.jobs))):
            raise UserError(f"{self.folder.path} is damaged: its jobs are not numbered from 0 on")
        for file in self.folder.state_folder.glob("optuna.*"):
            file.unlink()
        sampler, pruner = self._make_sampler(0), self._make_pruner()
        study = replay_jobs(
            self.folder,
            self.objectives,
            self.search_space.distributions,
            None if isinstance(sampler, STATELESS_SAMPLERS) else sampler,
            None if isinstance(pruner, NopPruner) else pruner,
        )
        storage = make_storage(self.storage)
        optuna.copy_study(
            from_study_name=study.study_name,
            from_storage=study._storage,
            to_storage=storage,
            to_study_name=self.study_name,
        )
        return AskTellStudy(study_name=self.study_name, storage=storage)

    def _load_study(self) -> AskTellStudy:
        """Open the study in a database of the user, or create it there.

        Raises:
            ConfigError: The database cannot be opened, or its study is another one.
        """
        try:
            storage = make_storage(reveal_text(self.storage))
            if self.study_name not in optuna.get_all_study_names(storage):
                return create_study(self.study_name, self.objectives, storage)
        except Exception as error:  # each database driver has its own errors
            reason = str(error).partition("\n")[0] or type(error).__name__
            problem = f"={self.storage!r} cannot be opened: {reason}"
            raise ConfigError([ConfigIssue("hydra.sweeper.storage", problem)]) from error
        study = AskTellStudy(study_name=self.study_name, storage=storage)
        directions = [DIRECTIONS[monitor.mode] for monitor in self.objectives.values()]
        if study.directions != directions:
            saved, needed = (", ".join(d.name for d in ds) for ds in (study.directions, directions))
            problem = f"={study.study_name!r} exists with direction {saved}; this search needs"
            raise ConfigError([ConfigIssue("hydra.sweeper.study_name", f"{problem} {needed}")])
        return study

    def _make_sampler(self, num_trials: int) -> BaseSampler:
        """Make the sampler; one that resumes a search must not draw the same values again."""
        node, seed = self.options.sampler, self.options.sampler.get("seed")
        node = node | ({"seed": seed + num_trials} if isinstance(seed, int) else {})
        sampler: BaseSampler = Instantiator()("hydra.sweeper.sampler", node)
        return sampler

    def _make_pruner(self) -> BasePruner:
        node = self.options.pruner
        pruner: BasePruner = Instantiator()("hydra.sweeper.pruner", node)
        return pruner

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
            # A trial without parameters is outside the search space.
            if has_failed and trial.params and self.may_retry(job):
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
        job = self.folder.add(values, trial.number)
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
        run_folder = self.folder.run_folder(job)
        tell_result(self.study, job.number, run_folder, outcome, self.objectives)

    @property
    def batch_size(self) -> int:
        """Trials at a time."""
        return 1 if self.options.n_jobs == "auto" else self.options.n_jobs


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
        key: {_typed_key(parse_choice(text)): text for text in choices(override)}
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


def _distribution(override: Override) -> BaseDistribution:
    sweep, texts = parse_sweep(override), choices(override)
    if isinstance(sweep, ChoiceSweep) or (isinstance(sweep, RangeSweep) and sweep.shuffle):
        return CategoricalDistribution([parse_choice(text) for text in texts])
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
