"""Runs that are cut somewhere and go on: each ends as the one that was left alone."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch

from app.runtime.errors import ConfigError, UserError
from app.runtime.signals import TrainingInterrupted
from app.training.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from tests.support.interrupted_runs import RunJob, iteration_values, job_runner, samples_per_step
from tests.support.processes import assert_equal_runs, status_of
from tests.support.runs import FEW, run_app

SCHEDULES = {
    "warm-up": ("scheduler.warmup_steps=12",),
    "milestone": ("scheduler=multistep", "scheduler.lr_scheduler.milestones=[2,3]"),
    "plateau": (
        "scheduler=plateau",
        "scheduler.lr_scheduler.patience=0",
        "optimizer.lr=1e-5",
    ),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def shared(home: Path) -> Iterator[RunJob]:
    """Runs that several tests look at have names of their own."""
    with job_runner(home) as cut:
        yield cut


@pytest.fixture
def cut(tmp_path: Path) -> Iterator[RunJob]:
    with job_runner(tmp_path) as cut:
        yield cut


@pytest.fixture(scope="module", params=SCHEDULES)
def scheduled(request: pytest.FixtureRequest, shared: RunJob) -> tuple[str, tuple[str, ...], Path]:
    """A run with a schedule that nobody has cut."""
    words = SCHEDULES[request.param]
    whole = shared(f"whole-{request.param}", "none:0:0", *words)
    assert len({*iteration_values(whole, "train", "lr")}) > 1, "or nothing is tested"
    assert len(samples_per_step(whole)) == 20
    return request.param, words, whole


@pytest.mark.parametrize("step", [3, 7, 9, 12])  # counted from the trial, which is no step
def test_wherever_it_is_cut_the_rates_are_the_same(
    shared: RunJob, scheduled: tuple[str, tuple[str, ...], Path], step: int
) -> None:
    """Behind the first step, behind an epoch's last one, in warm-up, at a milestone, in a wait."""
    name, words, whole = scheduled
    folder = shared(f"{name}-{step}", f"raise:0:{step}", *words)
    shared(f"{name}-{step}", "none:0:0", *words)
    assert_equal_runs(whole, folder)
    assert samples_per_step(folder) == samples_per_step(whole)


def test_cut_before_the_validation_and_after_it_each_comes_once(cut: RunJob) -> None:
    whole = cut("whole", "none:0:0")
    for name, fault in (("before", "raise:0:4:valid"), ("after", "raise:0:7")):
        folder = cut(name, fault)
        state = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)
        epochs = [row["epoch"] for row in _history(state) if row["stage"] == "valid"]
        assert epochs == ([] if name == "before" else [1])
        cut(name, "none:0:0")
        assert_equal_runs(whole, folder)
        assert samples_per_step(folder) == samples_per_step(whole)
        table = pd.read_csv(folder / "summary_table.csv")
        assert table.groupby(["epoch", "stage"]).size().max() == 1


def _history(state: dict[str, str]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = json.loads(state["history"])
    return rows


@pytest.mark.parametrize("step", [7, 12])
def test_patience_goes_on_counting_and_the_best_stays(cut: RunJob, step: int) -> None:
    words = ("optimizer.lr=1e-9", "goal.patience=2", "trainer.max_epochs=9")
    whole = cut("whole", "none:0:0", *words)
    folder = cut("run", f"raise:0:{step}", *words)
    cut("run", "none:0:0", *words)
    assert_equal_runs(whole, folder)
    epochs = pd.read_csv(folder / "valid_summary_table.csv")["epoch"]
    assert len(epochs) < 9, "it stops early, at the same epoch"
    best = [torch.load(f / "checkpoints" / "best.pt", weights_only=True) for f in (whole, folder)]
    assert best[0]["epoch"] == best[1]["epoch"] < len(epochs)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_of_samples_is_the_same(cut: RunJob, workers: int) -> None:
    """With samples drawn at random in workers, and a watcher that draws in between."""
    words = (f"data.loader.num_workers={workers}", "+callbacks.draws._target_=faulty.Drawing")
    words = (*words, "trainer.max_epochs=2", "model.dropout=0.3")
    whole = cut("whole", "none:0:0", *words)
    folder = cut("run", "raise:0:9", *words)
    cut("run", "none:0:0", *words)
    assert_equal_runs(whole, folder)
    assert samples_per_step(folder) == samples_per_step(whole)


def test_another_number_of_ranks_takes_the_same_samples(cut: RunJob) -> None:
    whole = cut("whole", "none:0:0", "trainer.max_epochs=2")
    folder = cut("run", "raise:0:5", "trainer.max_epochs=2")
    alone = samples_per_step(folder)
    (folder / "ids0").unlink()
    cut("run", "none:0:0", "trainer.max_epochs=2", size=2)
    found = [*alone, *samples_per_step(folder, 2)]
    assert [sorted(step.split()) for step in found] == [
        sorted(step.split()) for step in samples_per_step(whole)
    ]
    log = (folder / "logs" / "rank1.log").read_text()
    assert "the run was cut on 1 ranks and goes on on 2" in log
    assert status_of(folder)["status"] == "completed"


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    words = ("model=mlp", "trainer.max_epochs=1", "hydra.run.dir=run", "resume=auto", *FEW)
    words = (*words, "trainer.limit_test_batches=2")
    assert run_app(tmp_path, *words).code == 0
    before = _digests(tmp_path)
    for again in (words, ("resume=run",)):
        ran = run_app(tmp_path, *again)
        assert ran.code == 0, ran.err
        assert "is complete: there is nothing to go on with" in ran.out
    assert _digests(tmp_path) == before
    longer = run_app(tmp_path, "resume=run", "trainer.max_epochs=2")
    assert longer.code == 0, longer.err
    assert pd.read_csv(tmp_path / "run/valid_summary_table.csv")["epoch"].tolist() == [1, 2]
    assert "differs from the saved run: trainer.max_epochs: 1 -> 2" in longer.out


def _digests(folder: Path) -> dict[Path, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_cut_at_the_step_that_is_the_last_of_all(cut: RunJob) -> None:
    words = ("trainer.max_epochs=null", "trainer.max_steps=8")
    whole = cut("whole", "none:0:0", *words)
    folder = cut("run", "raise:0:5:valid", *words)
    state = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)["training"]
    assert state["under_way"] is not None
    cut("run", "none:0:0", *words)
    assert_equal_runs(whole, folder)
    assert samples_per_step(folder) == samples_per_step(whole)


@pytest.mark.parametrize("step", [7, 9], ids=["between epochs", "in an epoch"])
def test_columns_of_callbacks_go_on(cut: RunJob, step: int) -> None:
    words = ("callbacks.tables.memory=true",)
    folder = cut("run", f"raise:0:{step}", *words)
    cut("run", "none:0:0", *words)
    for epoch in (1, 2, 3, 4):
        table = pd.read_csv(folder / f"epoch_details/epoch00{epoch}_train.csv")
        assert table["memory_mb"].gt(0).all()


def test_columns_of_callbacks_go_on_after_a_cut_in_validation(cut: RunJob) -> None:
    """Which begins anew, and so do they."""
    words = ("callbacks.tables.memory=true",)
    with pytest.raises(TrainingInterrupted):
        cut("run", "SIGTERM:0:3:valid", *words)
    folder = cut("run", "none:0:0", *words)
    for stage in ("train", "valid", "test"):
        taken = iteration_values(folder, stage, "memory_mb")
        assert taken
        assert min(taken) > 0


def test_a_run_that_diverged_does_not_go_on_by_itself(tmp_path: Path) -> None:
    words = ("model=mlp", "optimizer.lr=1e30", "trainer.max_epochs=3", "resume=auto", *FEW)
    words = (*words, "hydra.run.dir=run", "trainer.limit_test_batches=2")
    assert run_app(tmp_path, *words).code == 65
    before = _digests(tmp_path)
    again = run_app(tmp_path, *words)
    assert (again.code, _digests(tmp_path)) == (65, before)
    assert "has diverged: it goes on only with something changed" in again.out
    run_app(tmp_path, "resume=run", "optimizer.lr=0.001", "trainer.max_epochs=2")
    assert pd.read_csv(tmp_path / "run/train_summary_table.csv")["epoch"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("data.batch_size=4", "data.batch_size: 8 -> 4"),
        ("+metric/single@metric.train=[f1]", "metric.train.f1: None -> torchmetrics."),
        ("~metric.train.accuracy", "metric.train.accuracy: torchmetrics."),
        ("trainer.gradient_norm=true", "trainer.gradient_norm: False -> True"),
    ],
)
def test_batches_and_columns_cannot_change_in_the_midst_of_an_epoch(
    cut: RunJob, word: str, told: str
) -> None:
    cut("run", "raise:0:9")
    with pytest.raises(UserError, match=rf"^{re.escape(told)}.*in the midst of an epoch"):
        cut("run", "none:0:0", word)
    cut("run", "none:0:0")


@pytest.mark.parametrize("part", ["nonfinite", "watchers", "rows", "ranks"])
def test_a_state_with_something_else_in_it_is_one_clear_error(cut: RunJob, part: str) -> None:
    """Its checksum is right: somebody has made it so."""
    folder = cut("run", "raise:0:9", "callbacks.tables.memory=true")
    for file in (folder / "checkpoints").glob("last*.pt"):
        state = load_checkpoint(file)
        assert state.training is not None
        inside = state.training if part in state.training else state.training["under_way"]
        inside[part] = {"Tables-0": 3} if isinstance(inside[part], dict) else [3]
        save_checkpoint(file, state)
    with pytest.raises(UserError, match=r"is of other callbacks|is of other metrics or damaged"):
        cut("run", "none:0:0")


def test_a_column_of_a_callback_that_is_wanted_later_begins_there(cut: RunJob) -> None:
    folder = cut("run", "raise:0:9")
    state = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)["training"]
    done = state["under_way"]["batches"]
    cut("run", "none:0:0", "callbacks.tables.memory=true")
    table = pd.read_csv(folder / "epoch_details" / f"epoch00{state['batches'] // 5 + 1}_train.csv")
    assert table["memory_mb"].isna().tolist() == [place < done for place in range(len(table))]


def test_a_finished_run_can_be_made_longer(cut: RunJob) -> None:
    words = ("scheduler=constant",)
    whole = cut("whole", "none:0:0", *words)
    folder = cut("run", "none:0:0", *words, "trainer.max_epochs=2")
    cut("run", "none:0:0", *words)
    assert samples_per_step(folder) == samples_per_step(whole)
    one, other = (torch.load(f / "model.pt", weights_only=True) for f in (whole, folder))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_was_said_of_a_run_stays_said(tmp_path: Path) -> None:
    words = ("model=mlp", "name=mine", "tags=[a,b]", "notes=why", "trainer.max_epochs=1", *FEW)
    assert run_app(tmp_path, *words, "hydra.run.dir=run").code == 0
    again = run_app(tmp_path, "resume=run", "trainer.max_epochs=2", "notes=longer")
    assert again.code == 0, again.err
    status = status_of(tmp_path / "run")
    assert [status[key] for key in ("name", "tags", "notes")] == ["mine", ["a", "b"], "longer"]


def test_another_rate_is_taken_and_said(cut: RunJob) -> None:
    words = ("scheduler=multistep", "scheduler.lr_scheduler.milestones=[1,3]")
    folder = cut("run", "raise:0:13", *words, "optimizer.lr=0.01")
    cut("run", "none:0:0", *words, "optimizer.lr=0.02")
    rates = iteration_values(folder, "train", "lr")
    assert rates == pytest.approx([0.01] * 5 + [0.001] * 5 + [0.001] + [0.002] * 4 + [2e-4] * 5)
    state = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)
    assert state["training"]["learning"][""]["steps"] == 20
    assert len(state["training"]["learning"][""]["optimizer"]["state"]) == 4, "momenta stay"


def test_another_rate_is_taken_in_the_midst_of_a_schedule_by_steps(cut: RunJob) -> None:
    words = ("scheduler=constant", "scheduler.warmup_steps=20")
    folder = cut("run", "raise:0:13", *words, "optimizer.lr=0.01")
    cut("run", "none:0:0", *words, "optimizer.lr=0.02")
    before = [0.01 * step / 20 for step in range(1, 12)]
    after = [0.02 * step / 20 for step in range(12, 21)]
    assert iteration_values(folder, "train", "lr") == pytest.approx(before + after)


def test_tensorboard_goes_on_counting(cut: RunJob) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = ("callbacks/single@callbacks=[tensorboard]", "callbacks.tensorboard.hparams=false")
    folder = cut("run", "raise:0:9", *words)
    cut("run", "none:0:0", *words)
    drawn = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    drawn.Reload()
    assert [point.step for point in drawn.Scalars("train_step/loss")] == list(range(1, 21))
    assert [point.step for point in drawn.Scalars("train/loss_mean")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("model.hidden=[7]", "model.hidden: [128] -> [7]"),
        ("model=lenet", "model._target_"),
        ("optimizer=sgd", "optimizer._target_"),
        ("data.split.seed=4", "data.split.seed"),
    ],
)
def test_another_architecture_is_refused(shared: RunJob, home: Path, word: str, named: str) -> None:
    if not (home / "other").exists():
        shared("other", "raise:0:3")
    with pytest.raises(ConfigError) as refused:
        shared("other", "none:0:0", word)
    assert named in str(refused.value)
    assert "the run was trained so, and cannot be changed" in str(refused.value)
