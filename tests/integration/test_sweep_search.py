"""Complete Optuna searches."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import optuna
import pandas as pd
import pytest
import yaml
from optuna.trial import TrialState

from app.sweep.folder import SweepFolder
from tests.support import sweeps
from tests.support.processes import descendants, status_of, wait_until_exited
from tests.support.sweeps import RunSweep

SEARCH = "hydra/sweeper=optuna"
LR = "optimizer.lr=tag(log,interval(1e-4,0.1))"


def load_study(folder: Path, storage: str | None = None) -> optuna.Study:
    url = storage or f"sqlite:///{folder}/.sweep/optuna.db"
    (name,) = optuna.get_all_study_names(url)
    return optuna.load_study(study_name=name, storage=url)


def search_overrides(count: int, *options: str) -> tuple[str, ...]:
    return (SEARCH, f"hydra.sweeper.n_trials={count}", *options)


def test_search_failed_trials_are_retried_on_resume(sweep: RunSweep, tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    options = (
        sweeps.POOL,
        "hydra.launcher.slots=2",
        *sweeps.SWEEP_TASK,
        "+task.fault_step=1",
        "+task.fault=nothing,raise",
    )
    assert sweep(*search_overrides(4, *options, LR, "model.hidden=[16],[32]", "seed=2")) == 1
    folder = sweeps.sweep_folder(tmp_path)
    study, table = load_study(folder), sweeps.read_sweep_table(folder)
    assert [trial.number for trial in study.trials] == table["job"].tolist() == [0, 1, 2, 3]
    for trial, (_, line), job in zip(
        study.trials, table.iterrows(), sweeps.job_folders(folder), strict=True
    ):
        config = yaml.safe_load((job / "config.yaml").read_text())
        assert config["optimizer"]["lr"] == trial.params["optimizer.lr"] == line["optimizer.lr"]
        assert str(config["model"]["hidden"]) == trial.params["model.hidden"]
        if trial.params["+task.fault"] == "raise":
            assert (trial.state, line["status"]) == (TrialState.FAIL, "failed")
        else:
            assert (trial.state, line["status"]) == (TrialState.COMPLETE, "completed")
            assert trial.values == [status_of(job)["best"]["value"]] == [line["best_accuracy"]]
    assert {"failed", "completed"} == set(sweeps.job_statuses(folder))
    assert "History, accuracy" in (folder / "sweep.html").read_text()

    (tmp_path / "broken").unlink()
    failed = [trial.params for trial in study.trials if trial.state is TrialState.FAIL]
    assert sweep(f"sweep.resume={folder}", short=False) == 0
    again = load_study(folder).trials[4:]
    assert [trial.params for trial in again] == failed
    assert {trial.state for trial in again} == {TrialState.COMPLETE}
    assert len(sweeps.read_sweep_table(folder)) == 4 + len(failed)


def test_resume_killed_search_keeps_trial_numbers(sweep: RunSweep, tmp_path: Path) -> None:
    process = sweeps.start_sweep(
        tmp_path,
        *search_overrides(4, sweeps.POOL, LR, "+task.step_seconds=0.1"),
        steps=2 * 24 + 2 * 12 + 6,
    )
    pids = descendants(process.pid)
    process.kill()
    process.communicate(timeout=30)
    assert wait_until_exited(pids, 10.0)
    folder = sweeps.sweep_folder(tmp_path)
    before = load_study(folder)
    running = [trial for trial in before.trials if trial.state is TrialState.RUNNING]
    assert running
    done = {t.number: t.values for t in before.trials if t.state is TrialState.COMPLETE}
    assert sweep(f"sweep.resume={folder}", short=False) == 0
    after = load_study(folder)
    assert [trial.number for trial in after.trials] == [0, 1, 2, 3]
    assert {trial.state for trial in after.trials} == {TrialState.COMPLETE}
    for trial in running:
        assert after.trials[trial.number].params == trial.params
    assert {number: after.trials[number].values for number in done} == done
    assert sweeps.job_statuses(folder) == ["completed"] * 4
    rates = [trial.params["optimizer.lr"] for trial in after.trials]
    assert len(set(rates)) == 4  # later trials draw new values


def test_resume_finished_trial_unknown_to_study_is_not_rerun(
    sweep: RunSweep, tmp_path: Path
) -> None:
    """The process may be killed between the end of a job and telling the study."""
    assert sweep(*search_overrides(1, *sweeps.SWEEP_TASK, LR)) == 0
    path = sweeps.sweep_folder(tmp_path)
    study, folder = load_study(path), SweepFolder(path)
    trial = study.ask(study.trials[0].distributions)
    values = {key: repr(value) for key, value in trial.params.items()}
    job = folder.add(values, 1)
    folder.save()
    shutil.copytree(folder.run_folder(folder.jobs[0]), folder.run_folder(job))
    num_steps = len(sweeps.step_pids(tmp_path))
    assert sweep(f"sweep.resume={path}", "hydra.sweeper.n_trials=2", short=False) == 0
    assert len(sweeps.step_pids(tmp_path)) == num_steps
    assert [t.state for t in load_study(path).trials] == [TrialState.COMPLETE] * 2
    assert load_study(path).trials[1].values == study.trials[0].values


def test_search_median_pruner_prunes_bad_trials(sweep: RunSweep, tmp_path: Path) -> None:
    options = (
        "hydra/sweeper/pruner=median",
        "hydra.sweeper.pruner.n_startup_trials=1",
        "hydra/sweeper/sampler=random",
        "hydra.sweeper.storage=journal",
        "optimizer.lr=0.1,1e-7",
        "trainer.max_epochs=3",
    )
    assert sweep(*search_overrides(4, *options)) == 0
    folder = sweeps.sweep_folder(tmp_path)
    from app.training.pruning import make_storage

    storage = make_storage(f"journal:{folder}/.sweep/optuna.log")
    study = optuna.load_study(study_name=folder.name, storage=storage)
    states, table = [trial.state for trial in study.trials], sweeps.read_sweep_table(folder)
    pruned = [place for place, state in enumerate(states) if state is TrialState.PRUNED]
    assert pruned
    for place, trial in enumerate(study.trials):
        assert (place in pruned) == (table["status"][place] == "pruned")
        job = sweeps.job_folders(folder)[place]
        epochs = pd.read_csv(job / "train_summary_table.csv")["epoch"].max()
        assert epochs == (1 if place in pruned else 3)
        assert (job / "test_summary_table.csv").exists() == (place not in pruned)
        assert sorted(trial.intermediate_values) == list(range(1, epochs + 1))
        if place in pruned:
            assert trial.params["optimizer.lr"] == 1e-7


def test_search_two_ranks_prune_together(sweep: RunSweep, tmp_path: Path) -> None:
    options = (
        sweeps.POOL,
        "hydra.launcher.slots=1",
        "trainer.devices=2",
        "hydra/sweeper/pruner=median",
        "hydra.sweeper.pruner.n_startup_trials=1",
        "hydra/sweeper/sampler=grid",
        "optimizer.lr=0.1,1e-7",
    )
    assert sweep(*search_overrides(9, *options)) == 0
    folder = sweeps.sweep_folder(tmp_path)
    assert len(load_study(folder).trials) == 2  # the grid is exhausted
    assert sweep(f"sweep.resume={folder}", short=False) == 0
    assert len(load_study(folder).trials) == 2
    table = sweeps.read_sweep_table(folder).sort_values("optimizer.lr")
    assert [status_of(job)["ranks"] for job in sweeps.job_folders(folder)] == [2, 2]
    assert table["status"].iloc[1] == "completed"
    first = table["job"].tolist() == [
        0,
        1,
    ]  # the bad one ran first, without a median to compare with
    assert table["status"].iloc[0] == ("completed" if first else "pruned")


def test_search_several_objectives_are_reported_to_study(sweep: RunSweep, tmp_path: Path) -> None:
    objective = "+hydra.sweeper.objectives.time={metric: train/epoch_time, mode: min}"
    options = ("hydra/sweeper/sampler=nsgaii", objective, "model.hidden=[16],[512]")
    assert sweep(*search_overrides(3, *options)) == 0
    folder = sweeps.sweep_folder(tmp_path)
    study = load_study(folder)
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    for trial, job in zip(study.trials, sweeps.job_folders(folder), strict=True):
        best, rows = status_of(job)["best"], pd.read_csv(job / "train_summary_table.csv")
        time = rows[rows["epoch"] == best["epoch"]]["epoch_time"].item()
        assert trial.values == [best["value"], time]
    assert "Pareto front" in (folder / "sweep.html").read_text()


def test_search_study_of_other_direction_is_refused(
    sweep: RunSweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = f"sqlite:///{tmp_path}/mine.db"
    optuna.create_study(study_name="mine", storage=storage, direction="minimize")
    options = (f"hydra.sweeper.storage='{storage}'", "hydra.sweeper.study_name=mine", LR)
    assert sweep(*search_overrides(1, *options)) == 2
    err = capsys.readouterr().err
    assert "hydra.sweeper.study_name='mine' exists with direction MINIMIZE; this search" in err
    for count in (1, 2):  # several sweeps may share a study
        assert sweep(*search_overrides(1, *options, "goal.metric=loss", "goal.mode=min")) == 0
        states = [trial.state for trial in load_study(tmp_path, storage).trials]
        assert states == [TrialState.COMPLETE] * count


def test_search_ctrl_c_leaves_trial_running(tmp_path: Path) -> None:
    process = sweeps.start_sweep(
        tmp_path, *search_overrides(3, LR, "+task.step_seconds=0.1"), steps=30
    )
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    states = [trial.state for trial in load_study(sweeps.sweep_folder(tmp_path)).trials]
    assert states == [TrialState.COMPLETE, TrialState.RUNNING]
