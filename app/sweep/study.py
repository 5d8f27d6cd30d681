"""The Optuna study of a search, made from the jobs of its sweep.

The jobs and their run folders hold everything that a study needs to continue. A database that came
with the folder is never opened: it may be somebody else's, and some samplers unpickle their state
from it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.pruners import BasePruner, NopPruner
from optuna.samplers import BaseSampler, RandomSampler
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.study import Study, StudyDirection
from optuna.trial import Trial, TrialState, create_trial

from app.config.schema import MonitorConfig
from app.runtime.errors import UserError
from app.sweep.folder import SweepFolder
from app.sweep.job import SweepJob, parse_value
from app.sweep.outcome import (
    COMPLETED,
    DIVERGED,
    FAILED,
    PRUNED,
    RunStatus,
    read_history,
    read_run_status,
)
from app.training.history import Point, Row, goal_value, goal_values, point_of

log = logging.getLogger(__name__)
DIRECTIONS = {"max": StudyDirection.MAXIMIZE, "min": StudyDirection.MINIMIZE}
RETRY_OF, EXHAUSTED = "retry_of", "exhausted"  # user attributes of trials and of the study
# A diverged trial has no meaningful value, and must not be retried as a failed one is.
TRIAL_STATES = {
    PRUNED: TrialState.PRUNED,
    DIVERGED: TrialState.PRUNED,
    FAILED: TrialState.FAIL,
}
Objectives = Mapping[str, MonitorConfig]  # by name, the goal of the runs first


class AskTellStudy(Study):
    """A study for ask and tell that records when its sampler has tried everything."""

    def stop(self) -> None:
        """Record that the search space is exhausted; samplers call this method."""
        self.set_user_attr(EXHAUSTED, True)

    @property
    def is_exhausted(self) -> bool:
        """Whether the sampler has tried everything, in this or an earlier process."""
        return bool(self.user_attrs.get(EXHAUSTED))


def create_study(name: str, objectives: Objectives, storage: BaseStorage) -> AskTellStudy:
    """Create an empty study."""
    directions = [DIRECTIONS[objective.mode] for objective in objectives.values()]
    optuna.create_study(study_name=name, storage=storage, directions=directions)
    return AskTellStudy(study_name=name, storage=storage)


def replay_jobs(
    folder: SweepFolder,
    objectives: Objectives,
    distributions: dict[str, BaseDistribution],
    sampler: BaseSampler | None = None,
    pruner: BasePruner | None = None,
) -> AskTellStudy:
    """Make a study in memory with a trial for each job of a sweep, in the order of the jobs.

    Args:
        folder: Folder of the sweep.
        objectives: What the study optimizes.
        distributions: Search space; a job outside it becomes a failed trial without parameters.
        sampler: Asked for every trial and told its result, so that it learns what the sampler of
            the earlier commands knew (generations, for example); None if it has nothing to learn.
        pruner: Shown what the runs had reported; None if they did not report.
    """
    study = create_study(folder.path.name, objectives, InMemoryStorage())
    study.sampler, study.pruner = sampler or RandomSampler(), pruner or NopPruner()
    for job in folder.jobs:
        params = job_params(job)
        if not _is_in_space(params, distributions):
            log.warning("job %d is outside the search space; its result is not used", job.number)
            study.add_trial(create_trial(state=TrialState.FAIL))
            continue
        study.enqueue_trial(params, {} if job.retry_of is None else {RETRY_OF: job.retry_of})
        trial, run_folder = study.ask(distributions), folder.run_folder(job)
        _ = trial.relative_params  # asks the sampler, although the values are known
        if pruner is not None:
            _replay_reports(trial, history_rows(run_folder), next(iter(objectives.values())))
        tell_result(study, trial.number, run_folder, read_run_status(run_folder), objectives)
    return study


def study_record(
    objectives: Objectives, distributions: Mapping[str, BaseDistribution]
) -> dict[str, Any]:
    """Return what `sweep.json` keeps of a study, for the report."""
    return {
        "objectives": {name: asdict(objective) for name, objective in objectives.items()},
        "distributions": {key: distribution_to_json(d) for key, d in distributions.items()},
    }


def study_from_record(folder: SweepFolder) -> tuple[AskTellStudy, list[str]]:
    """Return the study of a finished or interrupted search, and the names of its objectives.

    Raises:
        UserError: The record or the folder of a run is damaged.
    """
    try:
        record = folder.study or {}
        objectives = {name: MonitorConfig(**node) for name, node in record["objectives"].items()}
        distributions = {
            key: json_to_distribution(text) for key, text in record["distributions"].items()
        }
        return replay_jobs(folder, objectives, distributions), list(objectives)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"the study in {folder.path} is damaged: {error!r}") from error


def job_params(job: SweepJob) -> dict[str, Any]:
    """Return the parameters of the trial that a job belongs to."""
    return {key: parse_choice(text) for key, text in job.values.items()}


def parse_choice(text: str) -> Any:
    """Parse a value of a swept key; Optuna cannot store dicts and lists, so these stay texts."""
    value = parse_value(text)
    return text if isinstance(value, (dict, list)) else value


def _is_in_space(params: dict[str, Any], distributions: dict[str, BaseDistribution]) -> bool:
    try:
        create_trial(state=TrialState.RUNNING, params=params, distributions=distributions)
    except (ValueError, TypeError):
        return False
    return True


def _replay_reports(trial: Trial, history: list[Row], goal: MonitorConfig) -> None:
    for item in goal_values(history, goal):
        trial.report(item.value, item.number)
        trial.should_prune()  # successive halving records here how far a trial has come


def tell_result(
    study: Study, number: int, run_folder: Path, outcome: RunStatus, objectives: Objectives
) -> None:
    """Tell a study the result of a trial; one that has not ended stays running there."""
    if outcome.status in TRIAL_STATES:
        study.tell(number, state=TRIAL_STATES[outcome.status])
    elif outcome.status == COMPLETED:
        values = objective_values(run_folder, outcome, objectives)
        if any(math.isnan(value) for value in values):
            log.warning("trial %d has no value of %s", number, ", ".join(objectives))
            study.tell(number, state=TrialState.FAIL)
        else:
            study.tell(number, values)


def objective_values(folder: Path, outcome: RunStatus, objectives: Objectives) -> list[float]:
    """Return the best value of the goal, and the values of the other objectives in that epoch."""
    _, *others = objectives.values()
    values = [outcome.value if outcome.value is not None else math.nan]
    best = outcome.content.get("best") or {}
    point = Point(best.get("epoch", 0), best.get("step"))
    history = history_rows(folder) if others else []
    rows = [row for row in history if row["stage"] == "test" or point_of(row) == point]
    for monitor in others:
        row: Row = next((r for r in reversed(rows) if r["stage"] == monitor.stage), {})
        values.append(goal_value(row, monitor) if row else math.nan)
    return values


def history_rows(folder: Path) -> list[Row]:
    """Return the rows of the summary table of a run; none if it has no table yet."""
    columns = read_history(folder)
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
