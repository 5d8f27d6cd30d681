"""Losses and gradients that are NaN or infinite: stop, skip or raise, and tracing."""

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
from app.data.loaders import make_loader
from app.data.sampling import EpochSampler
from app.runtime.errors import NonFiniteError
from app.runtime.nested import Nested
from app.runtime.signals import TrainingInterrupted
from app.training.accumulator import StageResult
from app.training.checkpoint.checkpoint import load_checkpoint
from app.training.events import Callback, StepEnd
from app.training.history import History
from app.training.limits import TrainingLimits
from app.training.nonfinite_trace import trace
from app.training.optim.finite_check import NonFiniteAction
from app.training.optim.lr_schedule import LRSchedule
from app.training.optim.optim_wrapper import OptimWrapper, OptimWrapperDict
from app.training.optim.weight_averaging import ExponentialMovingAverage
from app.training.rank_sync import StepBatch
from app.training.supervised import SupervisedTask
from app.training.task import StepOutput, Task
from app.training.trainer import Trainer
from tests.support import toy_training as toy

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(48, 3, generator=GENERATOR)
Y = (X[:, 0] > 0).long()
NAN_SAMPLE = 20  # in batch 3 of 8 samples each


class ResultRecorder(Callback):
    """Records the results of all stages."""

    def __init__(self) -> None:
        self.results: list[StageResult] = []

    def on_stage_end(self, result: StageResult, history: History) -> None:  # noqa: ARG002
        self.results.append(result)


def make_data(*samples: int) -> TensorDataset:
    """Return the data with NaN in these samples."""
    inputs = X.clone()
    inputs[list(samples), 1] = math.nan
    return TensorDataset(inputs, Y)


def data_without(*batches: int, size: int = 8) -> TensorDataset:
    """Return the data without some batches, counted from 1."""
    kept = [i for i in range(len(X)) if i // size + 1 not in batches]
    return TensorDataset(X[kept], Y[kept])


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))


def make_trainer(
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
    model = model or make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=fused)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)
    task = SupervisedTask(model, loss or nn.CrossEntropyLoss())
    wrapper = OptimWrapper(optimizer, LRSchedule(optimizer, scheduler, warmup_steps=2), **options)
    task.prepare_training(OptimWrapperDict(wrapper, policy))
    averaging = ExponentialMovingAverage(model, 0.5) if averaged else None
    return Trainer(
        task,
        TrainingLimits(epochs),
        folder,
        GoalConfig(goal, "min"),
        ResultRecorder(),
        averaging=averaging,
    )


def state_of(trainer: Trainer) -> dict[str, Any]:
    """Return everything that a step changes, including batch norm statistics."""
    optimizer = trainer.optimizers.single.state_dict()
    flat = {f"model.{n}": t.clone() for n, t in trainer.task.model.state_dict().items()}
    flat |= {f"average.{n}": t for n, t in trainer.steps.averaging.average.items()}
    for number, values in optimizer["optimizer"]["state"].items():
        flat |= {f"{number}.{name}": tensor.clone() for name, tensor in values.items()}
    schedule = optimizer["schedule"]
    rates = schedule["unwarmed_lrs"], trainer.optimizers.lrs(), schedule["steps"]
    return flat | {"steps": optimizer["steps"], "rates": rates, "scaler": optimizer["scaler"]}


def assert_bitwise_equal(state: dict[str, Any], other: dict[str, Any]) -> None:
    assert state.keys() == other.keys()
    for name, value in state.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, other[name]), name
        else:
            assert value == other[name], name


def losses(trainer: Trainer) -> list[float]:
    recorder = trainer.callbacks
    assert isinstance(recorder, ResultRecorder)
    return recorder.results[0].steps["loss"].tolist()


@pytest.mark.parametrize("averaged", [False, True])
def test_stop_keeps_the_state_from_before_the_step(tmp_path: Path, averaged: bool) -> None:
    trainer = make_trainer(tmp_path / "a", averaged=averaged, epochs=3)
    trainer.fit(make_loader(make_data(NAN_SAMPLE), 8))
    before = make_trainer(tmp_path / "b", averaged=averaged)
    before.fit(make_loader(TensorDataset(X[:16], Y[:16]), 8))
    assert_bitwise_equal(state_of(trainer), state_of(before))
    assert trainer.outcome == "diverged"
    assert np.isnan(losses(trainer)).tolist() == [False, False, True]
    (row,) = trainer.state.history
    assert (row["total_samples"], row["loss_mean"]) == (16, before.state.history[0]["loss_mean"])
    last = load_checkpoint(tmp_path / "a" / "checkpoints" / "last.safetensors")
    assert all(tensor.isfinite().all() for tensor in last.model.values())


@pytest.mark.parametrize("averaged", [False, True])
def test_skip_is_equal_to_training_without_the_batch(tmp_path: Path, averaged: bool) -> None:
    trainer = make_trainer(tmp_path / "a", "skip", averaged=averaged, epochs=2)
    trainer.fit(make_loader(make_data(NAN_SAMPLE), 8))
    other = make_trainer(tmp_path / "b", averaged=averaged, epochs=2)
    other.fit(make_loader(data_without(3), 8))
    assert_bitwise_equal(state_of(trainer), state_of(other))
    assert trainer.outcome == "completed"
    assert np.isnan(losses(trainer)).tolist() == [False, False, True, False, False, False]
    means = [[row["loss_mean"] for row in each.state.history] for each in (trainer, other)]
    assert means[0] == means[1]
    assert (trainer.steps.nonfinite.stats.count, trainer.steps.nonfinite.stats.skipped) == (2, 2)


def test_raise_keeps_the_weights_from_before_the_step(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "a", "raise")
    message = (
        r"the loss is not finite in train, epoch 1, step 3 \(step 3 of the run\), rank 0; it comes "
        r"from the batch itself; samples 16, 17, 18, 19, 20, 21, 22, 23; trainer\.on_nonfinite"
    )
    with pytest.raises(NonFiniteError, match=message):
        trainer.fit(make_loader(make_data(NAN_SAMPLE), 8))
    before = make_trainer(tmp_path / "b")
    before.fit(make_loader(TensorDataset(X[:16], Y[:16]), 8))
    assert_bitwise_equal(state_of(trainer), state_of(before))
    assert not (tmp_path / "a" / "checkpoints").exists()


def test_without_policy_nan_reaches_the_weights(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, None)
    trainer.fit(make_loader(make_data(NAN_SAMPLE), 8))
    assert not next(trainer.task.model.parameters()).isfinite().any()


class SquareRootModel(nn.Module):
    """Has an infinite gradient if an input is 0, while its loss is finite."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale, self.last = nn.Parameter(torch.ones(3)), nn.Linear(3, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.last((self.scale * inputs).abs().sqrt())
        return outputs


def test_nan_gradient_with_finite_loss_names_the_parameter(tmp_path: Path) -> None:
    inputs = X.clone()
    inputs[NAN_SAMPLE, 0] = 0
    trainer = make_trainer(tmp_path / "a", model=SquareRootModel())
    trainer.fit(make_loader(TensorDataset(inputs, Y), 8))
    before = make_trainer(tmp_path / "b", model=SquareRootModel())
    before.fit(make_loader(TensorDataset(X[:16], Y[:16]), 8))
    assert_bitwise_equal(state_of(trainer), state_of(before))
    first = trainer.steps.nonfinite.stats.first
    assert first is not None
    assert (first["kind"], first["where"], first["step"]) == (
        "gradient", "the gradient of 'scale'", 3,
    )  # fmt: skip


class Logarithm(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.log()


def test_nan_loss_names_the_first_module_with_nan_outputs(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Sequential(nn.ReLU(), Logarithm()), nn.Linear(5, 2))
    trainer = make_trainer(tmp_path, model=model)
    trainer.fit(make_loader(TensorDataset(X - 9, Y), 8))
    first = trainer.steps.nonfinite.stats.first
    assert first is not None
    assert (first["kind"], first["where"]) == ("loss", "module '1.1'")


def test_infinite_parameter_is_named(tmp_path: Path) -> None:
    model = make_model()
    model[3].bias.data[1] = math.inf  # type: ignore[union-attr, operator, index]
    trainer = make_trainer(tmp_path, model=model)
    trainer.fit(make_loader(make_data(), 8))
    first = trainer.steps.nonfinite.stats.first
    assert first is not None
    assert (first["step"], first["where"]) == (1, "the parameter '3.bias'")


def test_infinite_loss_with_finite_gradients_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, loss=lambda out, target: F.cross_entropy(out, target) + math.inf
    )
    trainer.fit(make_loader(make_data(), 8))
    first = trainer.steps.nonfinite.stats.first
    assert first is not None
    assert (first["kind"], first["where"], trainer.optimizers.steps) == ("loss", "the loss", 0)


def test_trace_changes_nothing(tmp_path: Path) -> None:
    model = nn.Sequential(make_model(), nn.Dropout(0.5))
    trainer = make_trainer(tmp_path, model=model)
    before, random = state_of(trainer), torch.get_rng_state()
    batches = [StepBatch((X, Y), 1), StepBatch(make_data(NAN_SAMPLE).tensors, 2)]
    assert trace(trainer.task, batches) == (2, 0, "loss", "the batch itself")
    assert_bitwise_equal(before, state_of(trainer))
    assert torch.equal(random, torch.get_rng_state())


def test_loader_indices_are_those_of_the_batches() -> None:
    numbers = torch.arange(48)
    for shuffle in (False, True):
        loader = make_loader(TensorDataset(numbers), 10, shuffle)
        for step, (batch,) in enumerate(loader.epoch(3), start=1):
            assert loader.indices(3, step).tolist() == batch.tolist()  # type: ignore[attr-defined]
    assert EpochSampler(48, 48, None).batch_indices(1, 5, 10).tolist() == list(range(40, 48))


@pytest.mark.parametrize("policy", ["stop", "raise"])
def test_deferred_check_makes_no_step_until_the_host_reads_the_result(
    tmp_path: Path, policy: NonFiniteAction
) -> None:
    """Fused optimizers on the CPU honour `found_inf` too."""
    trainer = make_trainer(tmp_path / "a", policy, fused=True, epochs=2)
    trainer.optimizers.finite_check.defers = True
    batches = make_loader(
        TensorDataset(*(t.repeat(4, *[1] * (t.ndim - 1)) for t in make_data(NAN_SAMPLE).tensors)), 8
    )
    if policy == "raise":
        with pytest.raises(NonFiniteError, match=r"epoch 1, step 3 .* from the batch itself"):
            trainer.fit(batches)
    else:
        trainer.fit(batches)
        assert np.isnan(losses(trainer)).tolist() == [False] * 2 + [True] * 9  # read 8 steps later
        assert trainer.state.history[0]["total_samples"] == 16
    before = make_trainer(tmp_path / "b", fused=True)
    before.fit(make_loader(TensorDataset(X[:16], Y[:16]), 8))
    assert_bitwise_equal(state_of(trainer), state_of(before))


def test_deferred_check_is_read_at_the_end_of_the_epoch(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, fused=True)
    trainer.optimizers.finite_check.defers = True
    trainer.fit(make_loader(make_data(47), 8))
    assert trainer.outcome == "diverged"
    assert trainer.optimizers.steps == 5


def test_skip_with_accumulation_skips_all_batches_of_the_step_and_names_the_one(
    tmp_path: Path,
) -> None:
    options = {"batch_size": 8, "accumulate": 2}
    trainer = make_trainer(tmp_path / "a", "skip", **options)
    trainer.fit(make_loader(make_data(28), 8))
    other = make_trainer(tmp_path / "b", **options)
    other.fit(make_loader(data_without(3, 4), 8))
    assert_bitwise_equal(state_of(trainer), state_of(other))
    assert np.isnan(losses(trainer)).tolist() == [False, False, True, True, False, False]
    first = trainer.steps.nonfinite.stats.first
    assert first is not None
    assert (first["step"], first["samples"]) == (4, list(range(24, 32)))


def test_overflow_that_the_grad_scaler_handles_is_not_counted(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    trainer = make_trainer(tmp_path / "a", model=nn.Linear(3, 2), scaler=scaler)
    trainer.fit(make_loader(TensorDataset(100 * X, Y), 8))
    assert scaler.get_scale() < 2.0**127
    assert (trainer.steps.nonfinite.stats.count, trainer.outcome) == (0, "completed")

    for policy in ("skip", "stop"):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        trainer = make_trainer(tmp_path / policy, policy, scaler=scaler, clip_norm=1.0)  # type: ignore[arg-type]
        trainer.fit(make_loader(make_data(NAN_SAMPLE), 8))
        assert trainer.steps.nonfinite.stats.count == 1
        assert scaler.get_scale() == 2.0
        assert trainer.optimizers.steps == (5 if policy == "skip" else 2)


def test_zero_non_finite_gradients_checks_the_loss_only(tmp_path: Path) -> None:
    inputs = X.clone()
    inputs[NAN_SAMPLE, 0] = 0
    trainer = make_trainer(tmp_path / "a", model=SquareRootModel(), zero_non_finite=True)
    trainer.fit(make_loader(TensorDataset(inputs, Y), 8))
    assert (trainer.optimizers.steps, trainer.steps.nonfinite.stats.count) == (6, 0)
    trainer = make_trainer(tmp_path / "b", model=SquareRootModel(), zero_non_finite=True)
    trainer.fit(make_loader(make_data(NAN_SAMPLE), 8))
    assert (trainer.optimizers.steps, trainer.outcome) == (2, "diverged")


class TwoModelTask(Task):
    """Two optimizers; only the loss of the second may be NaN."""

    def train_step(self, batch: Nested) -> StepOutput:
        inputs, targets = batch
        assert self.optimizers is not None
        finite = inputs.nan_to_num()
        first = F.cross_entropy(self.model[0](finite), targets)  # type: ignore[index, operator]
        self.optimizers["0"].step(first, len(inputs))
        second = F.cross_entropy(self.model[1](inputs), targets)  # type: ignore[index, operator]
        self.optimizers["1"].step(second, len(inputs))
        return self.step_output("train", finite, targets, first + second)


def make_two_model_trainer(
    folder: Path, task_class: type[TwoModelTask], policy: NonFiniteAction, fused: bool = False
) -> Trainer:
    torch.manual_seed(0)
    task = task_class(nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)]))
    wrappers = {
        str(number): OptimWrapper(
            torch.optim.SGD(part.parameters(), lr=0.1, fused=fused), owns_all_parameters=False
        )
        for number, part in enumerate(task.model.children())
    }
    task.prepare_training(OptimWrapperDict(wrappers, policy))
    return Trainer(task, TrainingLimits(1), folder, callbacks=ResultRecorder())


@pytest.mark.parametrize(
    ("policy", "defers", "steps"),
    [("skip", False, (6, 5)), ("stop", False, (3, 2)), ("stop", True, (3, 2))],
)
def test_only_the_optimizer_with_nan_gradients_makes_no_step(
    tmp_path: Path, policy: NonFiniteAction, defers: bool, steps: tuple[int, int]
) -> None:
    trainer = make_two_model_trainer(tmp_path, TwoModelTask, policy, fused=defers)
    task, wrappers = trainer.task, trainer.optimizers.wrappers
    trainer.optimizers.finite_check.defers = defers
    trainer.fit(make_loader(make_data(NAN_SAMPLE), 8))
    assert tuple(wrapper.steps for wrapper in wrappers.values()) == steps
    assert all(parameter.isfinite().all() for parameter in task.model.parameters())
    assert np.isnan(losses(trainer))[2]


def test_nan_of_an_optimizer_that_is_not_fused_is_handled_at_once(tmp_path: Path) -> None:
    trainer = make_two_model_trainer(tmp_path, TwoModelTask, "stop", fused=True)
    trainer.optimizers.finite_check.defers = True
    (group,) = trainer.optimizers["1"].optimizer.param_groups
    group["fused"] = False
    trainer.fit(make_loader(make_data(NAN_SAMPLE), 8))
    assert tuple(wrapper.steps for wrapper in trainer.optimizers.wrappers.values()) == (3, 2)
    assert np.isnan(losses(trainer)).tolist() == [False, False, True]


class SharedLossTask(TwoModelTask):
    """The loss of the first optimizer depends on the second part, too."""

    def train_step(self, batch: Nested) -> StepOutput:
        inputs, targets = batch
        assert self.optimizers is not None
        outputs = sum(part(inputs.nan_to_num()) for part in self.model.children())
        self.optimizers["0"].step(F.cross_entropy(outputs, targets), len(inputs))  # type: ignore[arg-type]
        second = F.cross_entropy(self.model[1](inputs), targets)  # type: ignore[index, operator]
        self.optimizers["1"].step(second, len(inputs))
        return self.step_output("train", inputs, targets, second)


class NanFirstTask(TwoModelTask):
    """Steps the optimizer whose loss may be NaN before the other one."""

    def train_step(self, batch: Nested) -> StepOutput:
        inputs, targets = batch
        assert self.optimizers is not None
        second = F.cross_entropy(self.model[1](inputs), targets)  # type: ignore[index, operator]
        self.optimizers["1"].step(second, len(inputs))
        first = F.cross_entropy(self.model[0](inputs.nan_to_num()), targets)  # type: ignore[index, operator]
        self.optimizers["0"].step(first, len(inputs))
        return self.step_output("train", inputs, targets, second)


@pytest.mark.parametrize(
    ("policy", "defers", "steps"),
    [("skip", False, (6, 5)), ("stop", False, (2, 2)), ("stop", True, (2, 2))],
)
def test_no_optimizer_steps_after_the_one_with_nan_if_training_ends(
    tmp_path: Path, policy: NonFiniteAction, defers: bool, steps: tuple[int, int]
) -> None:
    trainer = make_two_model_trainer(tmp_path, NanFirstTask, policy, fused=defers)
    trainer.optimizers.finite_check.defers = defers
    trainer.fit(make_loader(make_data(NAN_SAMPLE), 8))
    assert tuple(wrapper.steps for wrapper in trainer.optimizers.wrappers.values()) == steps


def test_nan_beside_a_frozen_optimizer_is_traced(tmp_path: Path) -> None:
    trainer = make_two_model_trainer(tmp_path, SharedLossTask, "stop")
    trainer.task.model.get_submodule("0").requires_grad_(False)
    trainer.fit(make_loader(make_data(NAN_SAMPLE), 8))
    first = trainer.steps.nonfinite.stats.first
    assert first is not None
    assert (first["step"], first["where"]) == (3, "the batch itself")


def test_diverged_run_resumes_only_if_has_diverged_is_reset(tmp_path: Path) -> None:
    make_trainer(tmp_path, epochs=3).fit(make_loader(make_data(NAN_SAMPLE), 8))
    trainer = make_trainer(tmp_path, "skip", epochs=3)
    trainer.resume(tmp_path / "checkpoints" / "last.safetensors")
    trainer.fit(make_loader(make_data(NAN_SAMPLE), 8))
    assert [row["epoch"] for row in trainer.state.history] == [1]
    assert trainer.outcome == "diverged"
    trainer.steps.nonfinite.has_diverged = False
    trainer.fit(make_loader(make_data(NAN_SAMPLE), 8))
    assert [row["epoch"] for row in trainer.state.history] == [1, 2, 3]
    assert trainer.optimizers.steps == 2 + 5 + 5
    assert trainer.outcome == "completed"


class RaiseSigterm(ResultRecorder):
    """Raises SIGTERM after a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step, self.steps = step, 0

    def on_step_end(self, step: StepEnd) -> None:  # noqa: ARG002
        self.steps += 1
        if self.steps == self.step:
            signal.raise_signal(signal.SIGTERM)


def interrupt_at(step: int, trainer: Trainer, loader: BatchLoader) -> None:
    """Train until SIGTERM interrupts it after a step."""
    trainer.callbacks = RaiseSigterm(step)
    with trainer.stop.signal.installed(), pytest.raises(TrainingInterrupted):
        trainer.fit(loader)


def test_interrupted_at_the_nan_step_diverges_when_resumed(tmp_path: Path) -> None:
    uninterrupted = make_trainer(tmp_path / "whole", epochs=3)
    uninterrupted.fit(make_loader(make_data(NAN_SAMPLE), 8))
    interrupt_at(3, make_trainer(tmp_path / "run", epochs=3), make_loader(make_data(NAN_SAMPLE), 8))
    resumed = make_trainer(tmp_path / "run", epochs=3)
    resumed.resume(tmp_path / "run" / "checkpoints" / "last.safetensors")
    resumed.fit(make_loader(make_data(NAN_SAMPLE), 8))
    assert resumed.outcome == uninterrupted.outcome == "diverged"
    assert_bitwise_equal(state_of(resumed), state_of(uninterrupted))
    assert resumed.state.history[0]["loss_mean"] == uninterrupted.state.history[0]["loss_mean"]
    assert resumed.steps.nonfinite.stats == uninterrupted.steps.nonfinite.stats


def test_interrupted_after_skipped_steps_only_trains_the_rest_of_the_epoch(tmp_path: Path) -> None:
    nan_samples = (0, 8, 16)  # in the first three batches
    interrupt_at(
        2, make_trainer(tmp_path, "skip", epochs=1), make_loader(make_data(*nan_samples), 8)
    )
    resumed = make_trainer(tmp_path, "skip", epochs=1)
    resumed.resume(tmp_path / "checkpoints" / "last.safetensors")
    resumed.fit(make_loader(make_data(*nan_samples), 8))
    assert (resumed.outcome, resumed.optimizers.steps) == ("completed", 3)


def test_epoch_with_only_skipped_steps_ends_training(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "skip", epochs=9)
    trainer.fit(make_loader(make_data(*range(0, 48, 8)), 8))
    assert (trainer.state.epoch, trainer.outcome) == (1, "diverged")
    assert math.isnan(float(trainer.state.history[0]["loss_mean"]))
    assert trainer.steps.nonfinite.stats.skipped == 6


def test_nan_in_validation_is_reported_and_never_best(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tmp_path, epochs=2, goal="loss")
    with caplog.at_level(logging.WARNING):
        trainer.fit(make_loader(make_data(), 8), make_loader(make_data(NAN_SAMPLE), 8))
    assert "the loss is not finite in valid, epoch 1, step 3" in caplog.text
    assert not (tmp_path / "checkpoints" / "best.safetensors").exists()
    assert trainer.steps.nonfinite.stats.count == 2


class ExplodingLinear(nn.Linear):
    """Its outputs become NaN in the second epoch; or its gradients infinite, at once."""

    epochs, gradients = 0, False

    def train(self, mode: bool = True) -> ExplodingLinear:
        self.epochs += mode
        return super().train(mode)

    def forward(self, input: Tensor) -> Tensor:
        outputs = super().forward(input)
        if self.gradients:
            outputs.register_hook(lambda g: g.index_fill(1, torch.tensor(0), math.inf))
        return outputs * (math.nan if self.epochs == 2 else 1)


def test_nan_in_the_second_epoch_keeps_the_best_of_the_first(tmp_path: Path) -> None:
    trainer = toy.make_trainer(tmp_path, ExplodingLinear(3, 2), goal=GoalConfig("loss", "min"))
    trainer.limits = TrainingLimits(max_epochs=4)
    trainer.fit(make_loader(toy.DATA, 32), make_loader(toy.DATA, 32))
    assert trainer.state.epoch == 2
    assert trainer.outcome == "diverged"
    assert load_checkpoint(tmp_path / "checkpoints" / "best.safetensors").epoch == 1


def test_zero_non_finite_sets_infinite_gradients_to_zero(tmp_path: Path) -> None:
    for zero in (False, True):
        model = ExplodingLinear(3, 2)
        model.gradients = True
        before = model.weight.detach().clone()
        trainer = toy.make_trainer(tmp_path / str(zero), model, 1)
        trainer.optimizers.single.zero_non_finite = zero
        trainer.fit(make_loader(toy.DATA, 32))
        assert torch.equal(model.weight, before) != zero
        if zero:
            assert torch.equal(model.weight[0], before[0])
            assert not torch.equal(model.weight[1], before[1])
