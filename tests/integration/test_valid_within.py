"""Validation within epochs: what it measures, saves and counts, and that it changes no training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau

from app.callbacks.tables import Tables, truncate_to_history
from app.config.schema import GoalConfig
from app.data.batch import Batch, BatchLoader
from app.data.loaders import make_loader
from app.losses.dice import DiceLoss
from app.runtime.errors import UserError
from app.runtime.signals import StopReason, TrainingInterrupted
from app.training.checkpoint.header import read_info
from app.training.events import Callback, Callbacks, EpochEnd, StageStart, StepEnd
from app.training.history import goal_values, point_of
from app.training.limits import SaveSchedule, TrainingLimits
from app.training.optim.lr_schedule import LRSchedule
from app.training.optim.optim_wrapper import OptimWrapper, OptimWrapperDict
from app.training.optim.weight_averaging import StochasticWeightAveraging
from app.training.supervised import SupervisedTask
from app.training.trainer import Trainer
from tests.support.training_datasets import DATASETS

GOAL = GoalConfig("loss", "min")
TIMES = ["epoch_time", "samples/s"]
POINTS = [(1, 2), (1, 3), (2, 4), (2, 6), (3, 8), (3, 9)]  # epochs of three steps


def make_trainer(
    folder: Path, every: int | None = 2, plateau: bool = False, sums: bool = False, **options: Any
) -> Trainer:
    """Trainer of a model whose training draws random numbers.

    With `sums`, its loss is a function of sums over two accumulated batches.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    task = SupervisedTask(model, DiceLoss(per_sample=False) if sums else nn.CrossEntropyLoss())
    optimizer = SGD(model.parameters(), lr=0.1)
    schedule = ReduceLROnPlateau(optimizer, factor=0.5, patience=0) if plateau else None
    lrs, accumulation = LRSchedule(optimizer, schedule, per_epoch=True), (20, 2) if sums else ()
    wrapper = OptimWrapper(optimizer, lrs, None, *accumulation)
    task.prepare_training(OptimWrapperDict(wrapper))
    limits = options.pop("limits", {})
    options = {"goal": GOAL, **options}
    if options.pop("swa", False):
        options["averaging"] = StochasticWeightAveraging(model, start_epoch=1)
    limits = TrainingLimits(**{"max_epochs": 3, "valid_every_n_steps": every, **limits})
    return Trainer(task, limits, folder, **options)


class NoisyLoader:
    """Loader that draws random numbers for each batch, and allows one iteration at a time."""

    def __init__(self, loader: BatchLoader) -> None:
        self.loader, self.iterations = loader, 0
        self.num_batches, self.num_samples = loader.num_batches, loader.num_samples

    def epoch(self, epoch: int) -> Iterator[Batch | None]:
        self.iterations += 1
        number = self.iterations
        for inputs, targets in self.loader.epoch(epoch):  # type: ignore[misc]
            assert self.iterations == number, "another iteration has begun"
            yield inputs + torch.randn_like(inputs), targets

    def first(self, count: int) -> Batch:
        return self.loader.first(count)


def fit(trainer: Trainer, kind: str = "tensors") -> pd.DataFrame:
    size = 20 // trainer.optimizers.accumulate
    train, valid = make_loader(DATASETS[kind](), size), make_loader(DATASETS["tensors"](), 50)
    return trainer.fit(NoisyLoader(train), valid)


def points(trainer: Trainer, stage: str = "valid") -> list[tuple[int, int | None]]:
    return [tuple(point_of(row)) for row in trainer.state.history if row["stage"] == stage]  # type: ignore[misc]


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([t.flatten().double() for t in trainer.task.model.state_dict().values()])


@pytest.mark.parametrize(
    ("kind", "sums"), [*((kind, False) for kind in DATASETS), ("tensors", True)]
)
def test_validation_within_epochs_does_not_change_training(
    tmp_path: Path, kind: str, sums: bool
) -> None:
    plain = make_trainer(tmp_path / "plain", None, sums=sums)
    within = make_trainer(tmp_path / "within", sums=sums)
    expected, actual = fit(plain, kind), fit(within, kind)
    assert torch.equal(weights(plain), weights(within))
    assert points(within) == points(within, "train") == POINTS
    at_ends = actual[(actual["stage"] == "valid") & actual["step"].isin([3, 6, 9])]
    columns = ["loss_mean", "total_samples"]
    expected = expected[expected["stage"] == "valid"][columns].reset_index(drop=True)
    pd.testing.assert_frame_equal(at_ends[columns].reset_index(drop=True), expected)
    assert actual[actual["stage"] == "train"]["total_samples"].tolist() == [40, 10, 20, 30, 40, 10]


class StopAfter(Callback):
    """Asks to stop as a signal would, after a number of training or validation batches."""

    def __init__(self, stage: str, count: int) -> None:
        self.stage, self.count, self.trainer = stage, count, None

    def on_step_end(self, step: StepEnd) -> None:
        if step.stage == self.stage:
            self.count -= 1
            if self.count == 0 and self.trainer is not None:
                self.trainer.stop.signal.requested = StopReason.INTERRUPTED


@pytest.mark.parametrize(
    ("stage", "count", "options"),
    [
        *(("train", count, {}) for count in range(1, 10)),
        *(("valid", count, {}) for count in (2, 3, 4)),
        *(("train", count, {"sums": True}) for count in (1, 4, 5, 6, 7, 10)),
        ("valid", 2, {"sums": True}),
        ("train", 4, {"plateau": True}),
        ("valid", 4, {"swa": True}),
        ("train", 5, {"limits": {"save_schedule": SaveSchedule(every_n_steps=1)}}),
    ],
)
def test_run_that_stops_anywhere_resumes_exactly(
    tmp_path: Path, stage: str, count: int, options: dict[str, Any]
) -> None:
    whole = make_trainer(tmp_path / "whole", **options)
    expected = fit(whole)
    stop = StopAfter(stage, count)
    stopped = make_trainer(tmp_path / "run", callbacks=stop, **options)
    stop.trainer = stopped  # type: ignore[assignment]
    with pytest.raises(TrainingInterrupted):
        fit(stopped)
    resumed = make_trainer(tmp_path / "run", **options)
    resumed.resume(tmp_path / "run" / "checkpoints" / "last.safetensors")
    actual = fit(resumed)
    pd.testing.assert_frame_equal(actual.drop(columns=TIMES), expected.drop(columns=TIMES))
    assert torch.equal(weights(resumed), weights(whole))
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names >= {"best.safetensors", "last.safetensors"}


def test_best_weights_are_those_of_the_best_validation(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, limits={"save_schedule": SaveSchedule(save_top_k=2)})
    fit(trainer)
    ranked = sorted(goal_values(trainer.state.history, GOAL), key=lambda item: item.value)
    info = read_info(tmp_path / "checkpoints" / "best.safetensors")
    assert (info.epoch, info.step) == ranked[0].point
    top = {path.stem for path in (tmp_path / "checkpoints").glob("epoch*")}
    assert top == {item.point.label for item in ranked[:2]}
    epoch = trainer.state.load_best_weights()
    again = trainer.evaluate(make_loader(DATASETS["tensors"](), 50), "valid", epoch)
    assert again["loss_mean"][0] == ranked[0].value
    assert again["step"][0] == ranked[0].point.step


@pytest.mark.parametrize("plateau", [False, True])
def test_patience_and_plateau_count_validations(tmp_path: Path, plateau: bool) -> None:
    nothing_improves = GoalConfig("loss", "min", patience=None if plateau else 2, min_delta=9.0)
    trainer = make_trainer(tmp_path, plateau=plateau, goal=nothing_improves)
    if plateau:
        scheduler = trainer.optimizers.single.schedule.lr_scheduler
        assert isinstance(scheduler, ReduceLROnPlateau)
        scheduler.threshold, scheduler.threshold_mode = 9.0, "abs"
    fit(trainer)
    validated = points(trainer)
    assert validated == (POINTS if plateau else POINTS[:3])
    halved = len(validated) - 1 if plateau else 0
    assert trainer.optimizers.single.schedule.lr == 0.1 / 2**halved


def test_run_that_ended_within_an_epoch_has_nothing_left_to_train(tmp_path: Path) -> None:
    goal = GoalConfig("loss", "min", threshold=math.inf)
    first = make_trainer(tmp_path, goal=goal)
    fit(first)
    assert points(first) == POINTS[:1]
    resumed = make_trainer(tmp_path, goal=goal)
    resumed.resume(tmp_path / "checkpoints" / "last.safetensors")
    fit(resumed)
    assert points(resumed) == POINTS[:1]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"valid_every_n_epochs": None}, [(1, 2), (2, 4), (2, 6), (3, 8), (3, 9)]),
        ({"max_epochs": None, "max_steps": 5}, [(1, 2), (1, 3), (2, 4), (2, 5)]),
        ({"valid_every_n_steps": 3}, [(1, 3), (2, 6), (3, 9)]),
    ],
)
def test_points_follow_the_limits(
    tmp_path: Path, limits: dict[str, Any], expected: list[tuple[int, int]]
) -> None:
    trainer = make_trainer(tmp_path, limits=limits)
    fit(trainer)
    assert points(trainer) == expected


class Recorder(Callback):
    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def on_stage_start(self, start: StageStart) -> None:
        self.events.append((start.stage, tuple(start.point)))

    def on_epoch_end(self, end: EpochEnd) -> None:
        self.events.append(("end", tuple(end.point), end.is_complete))


def test_events_of_parts(tmp_path: Path) -> None:
    recorder = Recorder()
    fit(make_trainer(tmp_path, callbacks=recorder, limits={"max_epochs": 1}))
    assert recorder.events == [
        *(("train", (1, 0)), ("valid", (1, 2)), ("end", (1, 2), False)),
        *(("train", (1, 2)), ("valid", (1, 3)), ("end", (1, 3), True)),
    ]


def test_each_part_has_its_tables(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=Callbacks([Tables(tmp_path)]))
    fit(trainer)
    files = {path.stem for path in (tmp_path / "epoch_details").iterdir()}
    labels = [f"epoch{epoch:03d}_step{step:06d}" for epoch, step in POINTS]
    assert files == {f"{label}_{stage}" for label in labels for stage in ("train", "valid")}
    summary = pd.read_csv(tmp_path / "summary_table.csv")
    assert [*zip(summary["epoch"], summary["step"], strict=True)] == sorted([*POINTS, *POINTS])
    truncate_to_history(tmp_path, trainer.state.history[:2])
    files = {path.stem for path in (tmp_path / "epoch_details").iterdir()}
    assert files == {f"{labels[0]}_train", f"{labels[0]}_valid"}


def test_validation_within_epochs_needs_validation_data(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    with pytest.raises(UserError, match="valid_every_n_steps needs validation data"):
        trainer.fit(make_loader(DATASETS["tensors"](), 20))
