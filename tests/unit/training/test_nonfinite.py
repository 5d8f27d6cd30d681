"""Losses and gradients that are no numbers: no step is made of them, whatever then follows."""

from __future__ import annotations

import logging
import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from app.config.schema import GoalConfig
from app.data.batch import BatchLoader
from app.data.loaders import load
from app.data.sampling import EpochSampler
from app.runtime.errors import NonFiniteError
from app.runtime.nested import Nested
from app.runtime.signals import TrainingInterrupted
from app.training.accumulator import StageResult
from app.training.checkpoint.checkpoint import load_checkpoint
from app.training.events import Callback, StepEnd
from app.training.history import History
from app.training.nonfinite_trace import trace
from app.training.optim.finite_check import NonFiniteAction
from app.training.optim.lr_schedule import LRSchedule
from app.training.optim.optim_wrapper import OptimWrapper, OptimWrapperDict
from app.training.optim.weight_averaging import ExponentialMovingAverage
from app.training.plan import TrainingLimits
from app.training.supervised import SupervisedTask
from app.training.task import StepOutput, Task
from app.training.trainer import Trainer

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(48, 3, generator=GENERATOR)
Y = (X[:, 0] > 0).long()
BAD = 20  # this sample is none: batch 3 of 8 samples each


class Kept(Callback):
    """The rows of all stages."""

    def __init__(self) -> None:
        self.results: list[StageResult] = []

    def on_stage_end(self, result: StageResult, history: History) -> None:  # noqa: ARG002
        self.results.append(result)


def data(*samples: int) -> TensorDataset:
    """With NaN in these samples."""
    inputs = X.clone()
    inputs[list(samples), 1] = math.nan
    return TensorDataset(inputs, Y)


def without(*batches: int, size: int = 8) -> TensorDataset:
    """The same less some batches, counted from 1."""
    kept = [i for i in range(len(X)) if i // size + 1 not in batches]
    return TensorDataset(X[kept], Y[kept])


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))


def make(
    folder: Path,
    policy: NonFiniteAction | None = "stop",
    model: nn.Module | None = None,
    epochs: int = 1,
    fused: bool = False,
    averaged: bool = False,
    loss: Any = None,
    goal: str = "train/loss",
    **options: Any,
) -> Trainer:
    model = model or net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=fused)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)
    task = SupervisedTask(model, loss or nn.CrossEntropyLoss())
    one = OptimWrapper(optimizer, LRSchedule(optimizer, scheduler, warmup_steps=2), **options)
    task.optimizers = OptimWrapperDict(one, policy)
    averaging = ExponentialMovingAverage(model, 0.5) if averaged else None
    return Trainer(
        task, TrainingLimits(epochs), folder, GoalConfig(goal, "min"), Kept(), averaging=averaging
    )


def state_of(trainer: Trainer) -> dict[str, Any]:
    """All that a step changes, weights and statistics of batches among it."""
    learned = trainer.optimizers.single.state_dict()
    flat = {f"model.{n}": t.clone() for n, t in trainer.task.model.state_dict().items()}
    flat |= {f"average.{n}": t for n, t in trainer.averaging.average.items()}
    for number, values in learned["optimizer"]["state"].items():
        flat |= {f"{number}.{name}": tensor.clone() for name, tensor in values.items()}
    rates = learned["schedule"]["rates"], trainer.optimizers.lrs(), learned["schedule"]["steps"]
    return flat | {"steps": learned["steps"], "rates": rates, "scaler": learned["scaler"]}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, other[name]), name
        else:
            assert value == other[name], name


def losses(trainer: Trainer) -> list[float]:
    kept = trainer.callbacks
    assert isinstance(kept, Kept)
    return kept.results[0].steps["loss"].tolist()


@pytest.mark.parametrize("averaged", [False, True])
def test_stop_keeps_all_as_it_was_before_the_step(tmp_path: Path, averaged: bool) -> None:
    trainer = make(tmp_path / "a", averaged=averaged, epochs=3)
    trainer.fit(load(data(BAD), 8))
    before = make(tmp_path / "b", averaged=averaged)
    before.fit(load(TensorDataset(X[:16], Y[:16]), 8))
    assert_same(state_of(trainer), state_of(before))
    assert trainer.outcome == "diverged"
    assert np.isnan(losses(trainer)).tolist() == [False, False, True]
    (row,) = trainer.state.history
    assert (row["total_samples"], row["loss_mean"]) == (16, before.state.history[0]["loss_mean"])
    last = load_checkpoint(tmp_path / "a" / "checkpoints" / "last.pt")
    assert all(tensor.isfinite().all() for tensor in last.model.values())


@pytest.mark.parametrize("averaged", [False, True])
def test_skip_leaves_the_batch_out(tmp_path: Path, averaged: bool) -> None:
    trainer = make(tmp_path / "a", "skip", averaged=averaged, epochs=2)
    trainer.fit(load(data(BAD), 8))
    other = make(tmp_path / "b", averaged=averaged, epochs=2)
    other.fit(load(without(3), 8))
    assert_same(state_of(trainer), state_of(other))
    assert trainer.outcome == "completed"
    assert np.isnan(losses(trainer)).tolist() == [False, False, True, False, False, False]
    means = [[row["loss_mean"] for row in each.state.history] for each in (trainer, other)]
    assert means[0] == means[1]
    assert (trainer.nonfinite.stats.count, trainer.nonfinite.stats.skipped) == (2, 2)


def test_raise_ends_the_run_with_the_weights_before_the_step(tmp_path: Path) -> None:
    trainer = make(tmp_path / "a", "raise")
    wanted = (
        r"the loss is no number in train, epoch 1, step 3 \(step 3 of the run\), rank 0; it comes "
        r"from the batch itself; samples 16, 17, 18, 19, 20, 21, 22, 23; trainer\.on_nonfinite"
    )
    with pytest.raises(NonFiniteError, match=wanted):
        trainer.fit(load(data(BAD), 8))
    before = make(tmp_path / "b")
    before.fit(load(TensorDataset(X[:16], Y[:16]), 8))
    assert_same(state_of(trainer), state_of(before))
    assert not (tmp_path / "a" / "checkpoints").exists()


def test_without_a_policy_nobody_looks(tmp_path: Path) -> None:
    trainer = make(tmp_path, None)
    trainer.fit(load(data(BAD), 8))
    assert not next(trainer.task.model.parameters()).isfinite().any()


# ---- named


class Root(nn.Module):
    """Its gradient is none where an input is 0, its loss is a number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale, self.last = nn.Parameter(torch.ones(3)), nn.Linear(3, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.last((self.scale * inputs).abs().sqrt())
        return outputs


def test_gradients_that_are_no_numbers_where_the_loss_is_one(tmp_path: Path) -> None:
    inputs = X.clone()
    inputs[BAD, 0] = 0
    trainer = make(tmp_path / "a", model=Root())
    trainer.fit(load(TensorDataset(inputs, Y), 8))
    before = make(tmp_path / "b", model=Root())
    before.fit(load(TensorDataset(X[:16], Y[:16]), 8))
    assert_same(state_of(trainer), state_of(before))
    first = trainer.nonfinite.stats.first
    assert first is not None
    assert (first["kind"], first["where"], first["step"]) == (
        "gradient", "the gradient of 'scale'", 3,
    )  # fmt: skip


class Logarithm(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.log()


def test_the_first_module_is_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Sequential(nn.ReLU(), Logarithm()), nn.Linear(5, 2))
    trainer = make(tmp_path, model=model)
    trainer.fit(load(TensorDataset(X - 9, Y), 8))
    first = trainer.nonfinite.stats.first
    assert first is not None
    assert (first["kind"], first["where"]) == ("loss", "module '1.1'")


def test_a_parameter_that_was_none_already_is_named(tmp_path: Path) -> None:
    model = net()
    model[3].bias.data[1] = math.inf  # type: ignore[union-attr, operator, index]
    trainer = make(tmp_path, model=model)
    trainer.fit(load(data(), 8))
    first = trainer.nonfinite.stats.first
    assert first is not None
    assert (first["step"], first["where"]) == (1, "the parameter '3.bias'")


def test_a_loss_that_is_none_beside_gradients_that_are_numbers(tmp_path: Path) -> None:
    trainer = make(tmp_path, loss=lambda out, target: F.cross_entropy(out, target) + math.inf)
    trainer.fit(load(data(), 8))
    first = trainer.nonfinite.stats.first
    assert first is not None
    assert (first["kind"], first["where"], trainer.optimizers.steps) == ("loss", "the loss", 0)


def test_looking_into_it_changes_nothing(tmp_path: Path) -> None:
    model = nn.Sequential(net(), nn.Dropout(0.5))
    trainer = make(tmp_path, model=model)
    before, random = state_of(trainer), torch.get_rng_state()
    origin = trace(trainer.task, [((X, Y), False), (data(BAD).tensors, False)])
    assert origin is not None
    assert (origin.batch_index, origin.where) == (1, "the batch itself")
    assert_same(before, state_of(trainer))
    assert torch.equal(random, torch.get_rng_state())


def test_loaders_know_the_samples_of_a_batch() -> None:
    numbers = torch.arange(48)
    for shuffle in (False, True):
        loader = load(TensorDataset(numbers), 10, shuffle)
        for step, (batch,) in enumerate(loader.epoch(3), start=1):
            assert loader.indices(3, step).tolist() == batch.tolist()  # type: ignore[attr-defined]
    assert EpochSampler(48, 48, None).batch_indices(1, 5, 10).tolist() == list(range(40, 48))


# ---- on a device that nobody waits for


@pytest.mark.parametrize("policy", ["stop", "raise"])
def test_a_device_makes_no_step_until_the_host_has_seen(tmp_path: Path, policy: NonFiniteAction) -> None:
    """Fused optimizers can do so on the CPU, too."""
    trainer = make(tmp_path / "a", policy, fused=True, epochs=2)
    assert trainer.optimizers.finite_check is not None
    trainer.optimizers.finite_check.syncs = False
    batches = load(TensorDataset(*(t.repeat(4, *[1] * (t.ndim - 1)) for t in data(BAD).tensors)), 8)
    if policy == "raise":
        with pytest.raises(NonFiniteError, match=r"epoch 1, step 3 .* from the batch itself"):
            trainer.fit(batches)
    else:
        trainer.fit(batches)
        assert np.isnan(losses(trainer)).tolist() == [False] * 2 + [True] * 9  # seen 8 later
        assert trainer.state.history[0]["total_samples"] == 16
    before = make(tmp_path / "b", fused=True)
    before.fit(load(TensorDataset(X[:16], Y[:16]), 8))
    assert_same(state_of(trainer), state_of(before))


def test_a_device_is_asked_when_the_epoch_ends(tmp_path: Path) -> None:
    trainer = make(tmp_path, fused=True)
    assert trainer.optimizers.finite_check is not None
    trainer.optimizers.finite_check.syncs = False
    trainer.fit(load(data(47), 8))
    assert trainer.outcome == "diverged"
    assert trainer.optimizers.steps == 5


# ---- accumulation, precision, several optimizers


def test_accumulated_batches_are_left_out_together_and_the_first_is_named(tmp_path: Path) -> None:
    options = {"batch_size": 8, "accumulate": 2}
    trainer = make(tmp_path / "a", "skip", **options)
    trainer.fit(load(data(28), 8))
    other = make(tmp_path / "b", **options)
    other.fit(load(without(3, 4), 8))
    assert_same(state_of(trainer), state_of(other))
    assert np.isnan(losses(trainer)).tolist() == [False, False, True, True, False, False]
    first = trainer.nonfinite.stats.first
    assert first is not None
    assert (first["step"], first["samples"]) == (4, list(range(24, 32)))


def test_what_the_scaler_of_fp16_sees_to_is_not_counted(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    trainer = make(tmp_path / "a", model=nn.Linear(3, 2), scaler=scaler)
    trainer.fit(load(TensorDataset(100 * X, Y), 8))
    assert scaler.get_scale() < 2.0**127
    assert (trainer.nonfinite.stats.count, trainer.outcome) == (0, "completed")

    for policy in ("skip", "stop"):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        trainer = make(tmp_path / policy, policy, scaler=scaler, clip_norm=1.0)  # type: ignore[arg-type]
        trainer.fit(load(data(BAD), 8))
        assert trainer.nonfinite.stats.count == 1
        assert scaler.get_scale() == 2.0
        assert trainer.optimizers.steps == (5 if policy == "skip" else 2)


def test_only_the_loss_counts_where_gradients_are_zeroed(tmp_path: Path) -> None:
    inputs = X.clone()
    inputs[BAD, 0] = 0
    trainer = make(tmp_path / "a", model=Root(), zero_non_finite=True)
    trainer.fit(load(TensorDataset(inputs, Y), 8))
    assert (trainer.optimizers.steps, trainer.nonfinite.stats.count) == (6, 0)
    trainer = make(tmp_path / "b", model=Root(), zero_non_finite=True)
    trainer.fit(load(data(BAD), 8))
    assert (trainer.optimizers.steps, trainer.outcome) == (2, "diverged")


class Halves(Task):
    """Two optimizers; the loss of the second may be none."""

    def train_step(self, batch: Nested) -> StepOutput:
        inputs, targets = batch
        assert self.optimizers is not None
        whole = inputs.nan_to_num()
        first = F.cross_entropy(self.model[0](whole), targets)  # type: ignore[index, operator]
        self.optimizers["0"].step(first, len(inputs))
        second = F.cross_entropy(self.model[1](inputs), targets)  # type: ignore[index, operator]
        self.optimizers["1"].step(second, len(inputs))
        return self.step_output("train", whole, targets, first + second)


@pytest.mark.parametrize(("policy", "steps"), [("skip", (6, 5)), ("stop", (3, 2))])
def test_the_optimizer_with_bad_gradients_makes_no_step(
    tmp_path: Path, policy: NonFiniteAction, steps: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    task = Halves(nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)]))
    parts = task.model.children()
    made = {str(n): torch.optim.SGD(p.parameters(), lr=0.1) for n, p in enumerate(parts)}
    one = {
        name: OptimWrapper(optimizer, owns_all_parameters=False) for name, optimizer in made.items()
    }
    task.optimizers = OptimWrapperDict(one, policy)
    trainer = Trainer(task, TrainingLimits(1), tmp_path, callbacks=Kept())
    trainer.fit(load(data(BAD), 8))
    assert tuple(each.steps for each in one.values()) == steps
    assert all(parameter.isfinite().all() for parameter in task.model.parameters())
    assert np.isnan(losses(trainer))[2]


# ---- ends


def test_a_run_that_has_stopped_goes_on_where_it_is_told_to(tmp_path: Path) -> None:
    make(tmp_path, epochs=3).fit(load(data(BAD), 8))
    trainer = make(tmp_path, "skip", epochs=3)
    trainer.resume(tmp_path / "checkpoints" / "last.pt")
    trainer.fit(load(data(BAD), 8))
    assert [row["epoch"] for row in trainer.state.history] == [1]
    assert trainer.outcome == "diverged"
    trainer.nonfinite.has_diverged = False
    trainer.fit(load(data(BAD), 8))
    assert [row["epoch"] for row in trainer.state.history] == [1, 2, 3]
    assert trainer.optimizers.steps == 2 + 5 + 5
    assert trainer.outcome == "completed"


class Signals(Kept):
    """SIGTERM comes with a step of the first epoch."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step, self.steps = step, 0

    def on_step_end(self, step: StepEnd) -> None:  # noqa: ARG002
        self.steps += 1
        if self.steps == self.step:
            signal.raise_signal(signal.SIGTERM)


def cut_at(step: int, trainer: Trainer, batches: BatchLoader) -> None:
    """Preempted there, with everything saved."""
    trainer.callbacks = Signals(step)
    with trainer.stop_signal.installed(), pytest.raises(TrainingInterrupted):
        trainer.fit(batches)


def test_cut_at_the_bad_step_it_has_diverged_when_it_goes_on(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole", epochs=3)
    whole.fit(load(data(BAD), 8))
    cut_at(3, make(tmp_path / "run", epochs=3), load(data(BAD), 8))
    again = make(tmp_path / "run", epochs=3)
    again.resume(tmp_path / "run" / "checkpoints" / "last.pt")
    again.fit(load(data(BAD), 8))
    assert again.outcome == whole.outcome == "diverged"
    assert_same(state_of(again), state_of(whole))
    assert again.state.history[0]["loss_mean"] == whole.state.history[0]["loss_mean"]
    assert again.nonfinite.stats.to_dict() == whole.nonfinite.stats.to_dict()


def test_cut_after_bad_steps_alone_the_rest_of_the_epoch_is_tried(tmp_path: Path) -> None:
    bad = (0, 8, 16)  # the first three batches
    cut_at(2, make(tmp_path, "skip", epochs=1), load(data(*bad), 8))
    again = make(tmp_path, "skip", epochs=1)
    again.resume(tmp_path / "checkpoints" / "last.pt")
    again.fit(load(data(*bad), 8))
    assert (again.outcome, again.optimizers.steps) == ("completed", 3)


def test_an_epoch_without_a_step_is_the_last(tmp_path: Path) -> None:
    trainer = make(tmp_path, "skip", epochs=9)
    trainer.fit(load(data(*range(0, 48, 8)), 8))
    assert (trainer.state.epoch, trainer.outcome) == (1, "diverged")
    assert math.isnan(float(trainer.state.history[0]["loss_mean"]))
    assert trainer.nonfinite.stats.skipped == 6


def test_a_bad_batch_of_validation_is_named_and_is_never_best(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make(tmp_path, epochs=2, goal="loss")
    with caplog.at_level(logging.WARNING):
        trainer.fit(load(data(), 8), load(data(BAD), 8))
    assert "the loss is no number in valid, epoch 1, step 3" in caplog.text
    assert not (tmp_path / "checkpoints" / "best.pt").exists()
    assert trainer.nonfinite.stats.count == 2
