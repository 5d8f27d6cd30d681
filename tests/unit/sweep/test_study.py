"""Optuna studies that are made again from the jobs of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
from optuna.distributions import FloatDistribution
from optuna.samplers import BaseSampler, CmaEsSampler, NSGAIISampler, QMCSampler
from optuna.trial import FrozenTrial, TrialState

from app.config.schema import MonitorConfig
from app.sweep.folder import SweepFolder
from app.sweep.study import RETRY_OF, replay_jobs
from tests.support.sweeps import open_search, write_search

LOSS = {"loss": MonitorConfig("loss", "min")}
SPACE: dict[str, Any] = {"x": FloatDistribution(-1.0, 1.0), "y": FloatDistribution(-1.0, 1.0)}
SEARCH = ["x=interval(-1,1)", "y=interval(-1,1)"]


def completed(value: float) -> dict[str, Any]:
    return {"status": "completed", "best": {"value": value, "epoch": 1}}


def run_search(study: optuna.Study, count: int) -> list[FrozenTrial]:
    """Minimize a quadratic function, and return the trials."""
    for _ in range(count):
        trial = study.ask(SPACE)
        study.tell(trial, sum((trial.params[key] - 0.5) ** 2 for key in SPACE))
    return study.get_trials()


def generations(trials: list[FrozenTrial]) -> list[object]:
    """Return the generation that an evolutionary sampler has recorded for each trial."""
    return [next((v for k, v in t.system_attrs.items() if "generation" in k), None) for t in trials]


def sequence_position(study: optuna.Study) -> int:
    (position,) = study._storage.get_study_system_attrs(study._study_id).values()
    return int(position)


def write_trials(folder: SweepFolder, trials: list[FrozenTrial]) -> None:
    write_search(
        folder,
        [({k: repr(v) for k, v in t.params.items()}, completed(t.value or 0.0)) for t in trials],
    )


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("sampler", [CmaEsSampler, NSGAIISampler, QMCSampler])
def test_replay_jobs_sampler_learns_what_it_knew(
    tmp_path: Path, sampler: type[BaseSampler]
) -> None:
    arguments = {"population_size": 6} if sampler is NSGAIISampler else {}
    undisturbed = optuna.create_study(sampler=sampler(seed=1, **arguments))  # type: ignore[call-arg]
    trials = run_search(undisturbed, 40)
    folder = SweepFolder(tmp_path)
    write_trials(folder, trials)
    study = replay_jobs(folder, LOSS, SPACE, sampler(seed=2, **arguments))  # type: ignore[call-arg]
    assert [(t.params, t.values) for t in study.trials] == [(t.params, t.values) for t in trials]
    known, learned = map(generations, (trials, study.trials))
    assert known == learned
    if sampler is QMCSampler:
        assert sequence_position(study) >= sequence_position(undisturbed)  # nothing twice
    if sampler is CmaEsSampler:
        states = [CmaEsSampler()._restore_optimizer(found) for found in (trials, study.trials)]
        assert states[0] is not None
        assert states[1] is not None
        assert states[0].mean.tolist() == states[1].mean.tolist()
        assert states[0]._sigma == states[1]._sigma


def test_replay_jobs_keeps_states_retries_and_reports(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    values = {"x": "0.5", "y": "1e-05"}
    statuses: list[dict[str, Any]] = [
        *(completed(0.25), {"status": "pruned"}, {"status": "failed"}),
        *({"status": "diverged"}, {"status": "running"}, {}, completed(1.0)),
    ]
    write_search(folder, [(values, status) for status in statuses])
    folder.jobs[6].retry_of = 2
    folder.jobs[0].values = {"x": "7", "y": "0"}  # outside the search space
    table = pd.DataFrame({"epoch": [1, 1, 2], "stage": ["valid", "train", "valid"]})
    table["loss_mean"] = [0.1 + 0.2, 9.0, 0.3]
    for job in folder.jobs:
        table.to_csv(folder.run_folder(job) / "summary_table.csv", index=False)
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)
    trials = replay_jobs(folder, LOSS, SPACE, pruner=pruner).trials
    assert [trial.state for trial in trials] == [
        *(TrialState.FAIL, TrialState.PRUNED, TrialState.FAIL, TrialState.PRUNED),
        *(TrialState.RUNNING, TrialState.RUNNING, TrialState.COMPLETE),
    ]
    assert trials[0].params == {}
    assert [trial.params for trial in trials[1:]] == [{"x": 0.5, "y": 1e-05}] * 6
    assert trials[1].intermediate_values == {1: 0.1 + 0.2, 2: 0.3}
    assert trials[1].system_attrs["completed_rung_0"] == 0.1 + 0.2
    assert [trial.user_attrs.get(RETRY_OF) for trial in trials] == [*[None] * 6, 2]


@pytest.mark.parametrize("storage", ["sqlite", "journal"])
def test_resumed_search_continues_with_next_number(tmp_path: Path, storage: str) -> None:
    folder = SweepFolder(tmp_path)
    write_trials(folder, run_search(optuna.create_study(), 3))
    search = open_search(folder, SEARCH, storage=storage, n_trials=4)
    job = search.next_job()
    assert job is not None
    assert job.number == 3
    assert search.next_job() is None
    assert [t.state for t in search.study.trials] == [TrialState.COMPLETE] * 3 + [
        TrialState.RUNNING
    ]


def test_resumed_search_retries_failed_job_once_with_same_values(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    write_search(folder, [({"x": "0.5", "y": "0.5"}, {"status": "failed", "error": "e"})])
    folder.jobs[0].failures = 1
    search = open_search(folder, SEARCH, n_trials=1)
    job = search.next_job()
    assert job is not None
    assert (job.number, job.values, job.retry_of) == (1, {"x": "0.5", "y": "0.5"}, 0)
    assert search.next_job() is None
    again = open_search(SweepFolder(tmp_path), SEARCH, n_trials=1)
    assert again.next_job() == job  # it has not ended
    assert again.next_job() is None


def test_exhaustive_search_resumes_with_values_that_are_left(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    tried = [({"seed": str(seed)}, completed(0.5)) for seed in (4, 0, 3)]
    write_search(folder, tried)
    sampler = {"_target_": "optuna.samplers.BruteForceSampler", "seed": 0}
    search = open_search(folder, ["seed=range(5)"], sampler=sampler)
    found = []
    while (job := search.next_job()) is not None:
        found.append(job.values["seed"])
        search.study.tell(job.number, 0.5)
    assert sorted(found) == ["1", "2"]
