"""What changes learning: weights of the loss, averages, freezing, chained schedules, finders."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import TensorDataset

from app.config.schema import FreezeConfig, GoalConfig, MonitorConfig, TunerConfig
from app.data.loaders import load
from app.experiment.tuner import find_learning_rate, steepest_lr
from app.losses.weighted_sum import Term, WeightedSum
from app.losses.weights import LinearSchedule, ScheduledWeight, StepSchedule, UncertaintyWeight
from app.runtime.errors import UserError
from app.training.checkpoint.checkpoint import load_checkpoint
from app.training.optim.chain import chained, sequential
from app.training.optim.freezing import FreezeSchedule, matches
from app.training.optim.lr_schedule import LRSchedule
from app.training.optim.optim_wrapper import OptimWrapper, OptimWrapperDict
from app.training.optim.weight_averaging import (
    ExponentialMovingAverage,
    StochasticWeightAveraging,
    WeightAveraging,
)
from app.training.plan import TrainingLimits
from app.training.supervised import SupervisedTask
from app.training.trainer import Trainer
from tests.support.runs import config_issues

X = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
DATA = TensorDataset(X, Y)


def net(norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    middle: list[nn.Module] = [nn.BatchNorm1d(5)] if norm else []
    return nn.Sequential(nn.Linear(3, 5), *middle, nn.ReLU(), nn.Linear(5, 2))


def make(
    folder: Path, model: nn.Module, epochs: int = 3, loss: Any = None, **options: Any
) -> Trainer:
    task = SupervisedTask(model, loss or nn.CrossEntropyLoss())
    parameters = list(task.parameters().values())
    task.optimizers = OptimWrapperDict(
        OptimWrapper(
            torch.optim.SGD(parameters, lr=0.1), tracks_grad_norm=options.pop("norm", False)
        )
    )
    return Trainer(task, TrainingLimits(max_epochs=epochs), folder, **options)


# ---- weights of terms


def test_learned_weights_are_those_of_kendall() -> None:
    first, second = UncertaintyWeight("classification", 0.5), UncertaintyWeight("regression", -0.2)
    loss = WeightedSum(
        {"a": Term(F.cross_entropy, first, target=0), "b": Term(F.mse_loss, second, target=1)}
    )
    outputs = torch.randn(4, 2, requires_grad=True)
    targets = (torch.tensor([0, 1, 1, 0]), torch.randn(4, 2))
    total, terms = loss(outputs, targets)
    s = [0.5, -0.2]
    a, b = F.cross_entropy(outputs, targets[0]), F.mse_loss(outputs, targets[1])
    expected = math.exp(-s[0]) * a + s[0] / 2 + 0.5 * math.exp(-s[1]) * b + s[1] / 2
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(terms["b"], b)
    total.backward()
    torch.testing.assert_close(
        first.log_variance.grad, -math.exp(-s[0]) * a.detach() + 0.5, check_dtype=False
    )


def test_learned_weights_learn_are_columns_and_are_in_the_checkpoint(tmp_path: Path) -> None:
    learned = UncertaintyWeight()
    trainer = make(tmp_path, net(), loss={"entropy": Term(nn.CrossEntropyLoss(), learned)})
    summary = trainer.fit(load(DATA, 16))
    assert summary["entropy_weight"].iloc[0] != summary["entropy_weight"].iloc[-1]
    assert learned.log_variance.item() != 0
    state = load_checkpoint(tmp_path / "checkpoints" / "last.pt").task["loss"]
    assert [t.item() for t in state.values()] == [learned.log_variance.item()]
    other = make(
        tmp_path, net(), loss={"entropy": Term(nn.CrossEntropyLoss(), UncertaintyWeight())}
    )
    other.state.load_weights(tmp_path / "checkpoints" / "last.pt")
    assert (
        other.evaluate(load(DATA, 64))["loss_mean"][0]
        == trainer.evaluate(load(DATA, 64))["loss_mean"][0]
    )


@pytest.mark.parametrize(
    ("per", "expected"), [("step", [1, 2, 3, 4, 5, 6]), ("epoch", [1, 1, 2, 2, 3, 3])]
)
def test_scheduled_weights_follow_steps_or_epochs(
    tmp_path: Path, per: Any, expected: list[float]
) -> None:
    seen: list[float] = []

    class Told(nn.CrossEntropyLoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            seen.append(schedule.value)
            return super().forward(input, target)

    schedule = ScheduledWeight(float, per)
    trainer = make(tmp_path, net(), loss={"entropy": Term(Told(), schedule)})
    summary = trainer.fit(load(DATA, 32))
    assert seen == expected
    assert summary["loss_mean"].iloc[-1] == pytest.approx(
        np.mean(expected[-2:]) * summary["entropy"].iloc[-1], rel=0.05
    )


def test_a_weight_that_is_no_number_is_named_when_it_comes(tmp_path: Path) -> None:
    schedule = ScheduledWeight(lambda now: math.nan if now == 3 else 1.0, "step")
    trainer = make(tmp_path, net(), loss={"entropy": Term(nn.CrossEntropyLoss(), schedule)})
    with pytest.raises(UserError, match=r"loss\.entropy\.weight is nan at step 3"):
        trainer.fit(load(DATA, 8))


def test_a_weight_that_is_no_number_at_the_start_is_found_in_the_check() -> None:
    node = (
        "loss.cross_entropy.weight={_target_: app.losses.weights.ScheduledWeight, "
        "function: {_target_: app.losses.weights.LinearSchedule, start: nan, end: 1.0, last: 3}}"
    )
    (mistake,) = config_issues(node)
    assert "loss.cross_entropy.weight" in mistake
    assert "nan at epoch 1" in mistake


def test_a_constant_weight_that_is_no_number_is_found_in_the_check() -> None:
    (mistake,) = config_issues("loss.cross_entropy.weight=nan")
    assert mistake.startswith("loss.cross_entropy:")
    assert "weight=nan must be a finite number" in mistake


def test_a_scheduled_weight_is_no_goal_of_validation() -> None:
    weight = (
        "loss.cross_entropy.weight={_target_: app.losses.weights.ScheduledWeight, "
        "function: {_target_: app.losses.weights.LinearSchedule, start: 1.0, end: 2.0, last: 3}}"
    )
    (mistake,) = config_issues(weight, "goal.metric=cross_entropy_weight")
    assert "is not measured in valid" in mistake
    assert not config_issues(weight, "goal.metric=cross_entropy", "goal.mode=min")


def test_linear_and_stepwise_weights() -> None:
    assert [LinearSchedule(0.0, 1.0, 3)(now) for now in (1, 2, 3, 9)] == [0.0, 0.5, 1.0, 1.0]
    assert [StepSchedule(1.0, {3: 0.5, "5": 0.1})(now) for now in (1, 2, 3, 4, 5, 6)] == [
        1,
        1,
        0.5,
        0.5,
        0.1,
        0.1,
    ]


# ---- averages


def test_the_moving_average_is_that_of_torch(tmp_path: Path) -> None:
    model = net(norm=True)
    averaging = ExponentialMovingAverage(model, decay=0.9)
    reference = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    trainer = make(tmp_path, model, averaging=averaging)
    update = trainer.optimizers.single.apply

    def and_reference() -> None:
        update()
        reference.update_parameters(model)

    trainer.optimizers.single.apply = and_reference  # type: ignore[method-assign]
    trainer.fit(load(DATA, 8))
    expected = reference.module.state_dict()
    assert averaging.num_averaged == 24
    expected.pop("1.num_batches_tracked")  # torch averages whole numbers, too
    for name in expected:
        tensor = averaging.average[name]
        torch.testing.assert_close(tensor, expected[name])


def test_the_average_is_what_is_validated_and_kept_and_learning_goes_on_without_it(
    tmp_path: Path,
) -> None:
    plain, averaged = net(), net()
    make(tmp_path / "a", plain).fit(load(DATA, 8))
    averaging = ExponentialMovingAverage(averaged, decay=0.5)
    trainer = make(tmp_path / "b", averaged, averaging=averaging, goal=GoalConfig("loss", "min"))
    summary = trainer.fit(load(DATA, 8), load(DATA, 8))
    assert torch.equal(plain[0].weight, averaged[0].weight)  # type: ignore[arg-type]
    best = load_checkpoint(tmp_path / "b" / "checkpoints" / "best.pt")
    torch.testing.assert_close(best.model["0.weight"], averaging.average["0.weight"])
    assert not torch.equal(best.model["0.weight"], averaged[0].weight)  # type: ignore[arg-type]
    trainer.state.load_best_weights()
    again = trainer.evaluate(load(DATA, 8), "valid")["loss_mean"][0]
    assert again == summary[summary["stage"] == "valid"]["loss_mean"].min()
    last = load_checkpoint(tmp_path / "b" / "checkpoints" / "last.pt")
    assert last.training is not None
    torch.testing.assert_close(last.model["0.weight"], plain[0].weight.detach())  # type: ignore[union-attr, operator]
    assert last.training["averaging"]["count"] == 24


def test_stochastic_weight_averaging_is_the_mean_and_measures_batches_anew(tmp_path: Path) -> None:
    model = net(norm=True)
    averaging = StochasticWeightAveraging(model, 2)
    trainer = make(tmp_path, model, 4, averaging=averaging, goal=GoalConfig("loss", "min"))
    ends: list[Tensor] = []
    after = trainer.averaging.on_epoch_end

    def remember(epoch: int) -> None:
        ends.append(model[0].weight.detach().clone())  # type: ignore[union-attr, operator]
        after(epoch)

    trainer.averaging.on_epoch_end = remember  # type: ignore[method-assign]
    trainer.fit(load(DATA, 16), load(DATA, 16))
    expected = torch.stack(ends[1:]).mean(0)
    torch.testing.assert_close(trainer.averaging.average["0.weight"], expected)
    with trainer.averaged_weights(load(DATA, 64), 5):
        outputs = model[0](X)
        torch.testing.assert_close(model[1].running_mean, outputs.mean(0))
        torch.testing.assert_close(model[1].running_var, outputs.var(0))


def test_without_an_average_nothing_is_copied() -> None:
    model = net()
    before = model[0].weight.data_ptr()  # type: ignore[union-attr, operator]
    with WeightAveraging(model).swapped_in():
        assert model[0].weight.data_ptr() == before  # type: ignore[union-attr, operator]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("average=ema", "average.decay=1.5"), "decay=1.5 must be at least 0 and below 1"),
        (("average=swa", "average.start_epoch=0"), "start_epoch=0 must be at least 1"),
        (("average=emma",), "did you mean 'ema'"),
    ],
)
def test_mistakes_in_an_average(words: tuple[str, ...], message: str) -> None:
    assert any(message in mistake for mistake in config_issues(*words))


# ---- freezing


def test_frozen_parameters_stay_and_learn_when_their_epoch_comes(tmp_path: Path) -> None:
    model = net(norm=True)
    frozen = {
        "first": FreezeConfig("0", until_epoch=2),
        "norm": FreezeConfig("1"),
        "last": FreezeConfig("3.bias", 2),
    }
    trainer = make(tmp_path, model, freezing=FreezeSchedule(model, frozen))
    states = [copy.deepcopy(model.state_dict())]
    after = trainer.averaging.on_epoch_end

    def remember(epoch: int) -> None:
        states.append(copy.deepcopy(model.state_dict()))
        after(epoch)

    trainer.averaging.on_epoch_end = remember  # type: ignore[method-assign]
    trainer.fit(load(DATA, 8))

    def changed(name: str) -> list[bool]:
        return [not torch.equal(a[name], b[name]) for a, b in pairwise(states)]

    assert changed("0.weight") == [False, True, True]
    assert changed("1.weight") == changed("1.running_mean") == [False, False, False]
    assert changed("3.weight") == [True, True, True]
    assert changed("3.bias") == [True, False, False]


def test_what_a_pattern_of_parameters_fits() -> None:
    assert matches("layer1.0.weight", "layer1")
    assert matches("layer1.0.weight", "layer*.weight")
    assert not matches("layer10.weight", "layer1")
    with pytest.raises(UserError, match=r"freeze\.x\.parameters='lair' fits no parameter.*'layer'"):
        FreezeSchedule(nn.ModuleDict({"layer": nn.Linear(2, 2)}), {"x": FreezeConfig("lair")})


# ---- schedules


def rates(make_scheduler: Any, steps: int, warmup: int = 0) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = LRSchedule(optimizer, make_scheduler(optimizer), warmup_steps=warmup)
    found = []
    for _ in range(steps):
        found.append(schedule.lr)
        optimizer.step()
        schedule.on_step_end()
    return found


def falling(gamma: float) -> Any:
    return lambda o: torch.optim.lr_scheduler.ExponentialLR(o, gamma)


def steady(factor: float) -> Any:
    return lambda o: torch.optim.lr_scheduler.ConstantLR(o, factor, total_iters=2)


def test_schedules_one_after_the_other_and_all_at_once_with_warm_up() -> None:
    parts = {"a": falling(1.0), "b": falling(0.5)}
    after = lambda o: sequential(o, parts, [3])  # noqa: E731
    assert rates(after, 6) == [1, 1, 1, 1, 0.5, 0.25]
    assert rates(after, 6, warmup=2) == [0.5, 1, 1, 1, 0.5, 0.25]
    both = lambda o: chained(o, {"a": steady(0.1), "b": falling(0.5)})  # noqa: E731
    assert rates(both, 4) == pytest.approx([0.1, 0.05, 0.25, 0.125])
    with pytest.raises(ValueError, match="2 schedulers need 1 of them"):
        rates(lambda o: sequential(o, parts, [1, 2]), 1)


def test_a_schedule_that_gives_no_number_is_named() -> None:
    broken = lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda s: math.nan if s == 2 else 1.0)  # noqa: E731
    with pytest.raises(
        UserError, match=r"scheduler\.lr_scheduler: LambdaLR gave the learning rate nan"
    ):
        rates(broken, 4)


# ---- norms, monitors


def test_the_norm_of_the_gradients_is_a_column(tmp_path: Path) -> None:
    model = net()
    reference = copy.deepcopy(model)
    F.cross_entropy(reference(X), Y).backward()
    gradients = torch.cat([p.grad.flatten() for p in reference.parameters() if p.grad is not None])
    summary = make(tmp_path, model, 1, norm=True).fit(load(DATA, 64))
    assert summary["gradient_norm"][0] == pytest.approx(gradients.norm().item(), rel=1e-6)


def test_mistakes_in_monitors() -> None:
    found = config_issues(
        "+checkpoint.monitors.a={metric: los, mode: min}", "+checkpoint.monitors.b={metric: loss}"
    )
    assert any("checkpoint.monitors.b.mode is missing" in mistake for mistake in found)
    (mistake,) = config_issues("+checkpoint.monitors.a={metric: los, mode: min}")
    assert mistake.startswith("checkpoint.monitors.a.metric='los' is not measured in valid")
    assert MonitorConfig("train/loss", "min").stage == "train"


# ---- finders


def test_the_learning_rate_of_the_steepest_fall() -> None:
    lr = np.geomspace(1e-5, 1.0, 50)
    loss = 2.0 - 1 / (1 + np.exp(-4 * np.log(lr / 1e-2)))
    table = pd.DataFrame({"lr": lr, "smoothed_loss": loss})
    assert steepest_lr(table) == pytest.approx(1e-2, rel=0.3)
    with pytest.raises(UserError, match="never falls"):
        steepest_lr(table.assign(smoothed_loss=lr))


def test_the_finder_of_learning_rates_tries_them_all_or_stops_where_it_diverges(
    tmp_path: Path,
) -> None:
    trainer = make(tmp_path, net())
    find = TunerConfig(1e-4, 1e3, 40, 64, 2)
    found = find_learning_rate(trainer.task, load(DATA, 16), find, tmp_path)
    table = pd.read_csv(tmp_path / "find_lr.csv")
    assert 1e-4 < found < 100
    assert table["lr"].iloc[:3].tolist() == pytest.approx(list(np.geomspace(1e-4, 1e3, 40)[:3]))
    assert len(table) <= 40
    assert (tmp_path / "find_lr.png").read_bytes().startswith(b"\x89PNG")


def test_mistakes_in_finders() -> None:
    (mistake,) = config_issues("find.lr_from=1", "find.lr_to=0.1")
    assert mistake == "find.lr_from=1 must be below find.lr_to=0.1"
    assert any("ckpt" in mistake for mistake in config_issues("mode=find_lr", "ckpt=x"))


# ---- mixing


def test_mixed_batches_learn_from_mixed_targets_and_are_measured_against_plain_ones(
    tmp_path: Path,
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def mix(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        mixed = 0.75 * inputs + 0.25 * inputs.roll(1, 0)
        soft = 0.75 * F.one_hot(targets, 2) + 0.25 * F.one_hot(targets, 2).roll(1, 0)
        seen.append((mixed, soft))
        return mixed, soft

    def plain(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.argmax(1) == targets).float().mean()

    model = net()
    task = SupervisedTask(model, nn.CrossEntropyLoss(), {"train": {"plain": plain}}, mix=mix)
    task.optimizers = OptimWrapperDict(OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.0)))
    summary = Trainer(task, TrainingLimits(max_epochs=1), tmp_path).fit(
        load(DATA, 64), load(DATA, 64)
    )
    ((mixed, soft),) = seen
    outputs = model(mixed)
    assert summary["loss_mean"][0] == pytest.approx(F.cross_entropy(outputs, soft).item(), rel=1e-6)
    assert summary["loss_mean"][1] == pytest.approx(F.cross_entropy(model(X), Y).item(), rel=1e-6)
    assert summary["plain"][0] == pytest.approx(plain(outputs, Y).item())


# ---- what is no number


class Exploding(nn.Linear):
    """Its outputs become infinite in the second epoch, or its gradients at once."""

    epochs, gradients = 0, False

    def train(self, mode: bool = True) -> Exploding:
        self.epochs += mode
        return super().train(mode)

    def forward(self, input: Tensor) -> Tensor:
        outputs = super().forward(input)
        if self.gradients:
            outputs.register_hook(lambda g: g.index_fill(1, torch.tensor(0), math.inf))
        return outputs * (math.nan if self.epochs == 2 else 1)


def test_training_stops_at_a_loss_that_is_no_number(tmp_path: Path) -> None:
    trainer = make(tmp_path, Exploding(3, 2), goal=GoalConfig("loss", "min"))
    trainer.limits = TrainingLimits(max_epochs=4)
    trainer.fit(load(DATA, 32), load(DATA, 32))
    assert trainer.state.epoch == 2
    assert trainer.outcome == "diverged"
    assert load_checkpoint(tmp_path / "checkpoints" / "best.pt").epoch == 1


def test_gradients_that_are_no_numbers_may_become_zero(tmp_path: Path) -> None:
    for zero in (False, True):
        model = Exploding(3, 2)
        model.gradients = True
        before = model.weight.detach().clone()
        trainer = make(tmp_path / str(zero), model, 1)
        trainer.optimizers.single.zero_non_finite = zero
        trainer.fit(load(DATA, 32))
        assert torch.equal(model.weight, before) != zero
        if zero:
            assert torch.equal(model.weight[0], before[0])
            assert not torch.equal(model.weight[1], before[1])


# ---- ends and odd cases


def test_measuring_the_training_data_does_not_learn_from_it(tmp_path: Path) -> None:
    trainer = make(tmp_path, net(), 1)
    trainer.fit(load(DATA, 32))
    before = copy.deepcopy(trainer.task.model.state_dict())
    row = trainer.evaluate(load(DATA, 32), "train")
    assert row["stage"].tolist() == ["train"]
    for name, tensor in trainer.task.model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_plan_that_is_over_trains_no_more(tmp_path: Path) -> None:
    trainer = make(tmp_path, net(), 2)
    first = trainer.fit(load(DATA, 32))
    assert trainer.fit(load(DATA, 32)).equals(first)
    assert trainer.state.epoch == 2


def test_a_scaler_hears_of_overflows_that_are_zeroed() -> None:
    parameter = nn.Parameter(torch.ones(1))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    one = OptimWrapper(torch.optim.SGD([parameter], 0.1), scaler=scaler, zero_non_finite=True)
    one.step((parameter * 1e36).sum(), 1)
    assert scaler.get_scale() == 2.0**15
    assert parameter.item() == 1


def test_norms_of_gradients_with_accumulation_are_blank_between_steps(tmp_path: Path) -> None:
    trainer = make(tmp_path, net(), 1, norm=True)
    trainer.optimizers.single.accumulate, trainer.optimizers.single.full_batch_size = 2, 32
    found: list[float] = []
    trainer.callbacks.on_stage_end = lambda result, _: found.extend(result.steps["gradient_norm"])  # type: ignore[method-assign]
    summary = trainer.fit(load(DATA, 16))
    assert np.isnan(found[::2]).all()
    assert summary["gradient_norm"][0] == pytest.approx(np.mean(found[1::2]))


class TwoParts(nn.Module):
    """Takes two inputs; one of its norms may be frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        self.last = nn.Linear(3, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        outputs: Tensor = self.last(self.first(a) + self.second(b))
        return outputs


def test_averaging_measures_batches_of_several_inputs_but_no_frozen_norm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TwoParts()
    task = SupervisedTask(model, nn.CrossEntropyLoss(), inputs=[0, 0])
    task.optimizers = OptimWrapperDict(OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1)))
    trainer = Trainer(
        task,
        TrainingLimits(max_epochs=2),
        tmp_path,
        averaging=StochasticWeightAveraging(model, 1),
        freezing=FreezeSchedule(model, {"second": FreezeConfig("second")}),
    )
    trainer.fit(load(TensorDataset(X + 5, Y), 16))
    state = load_checkpoint(tmp_path / "checkpoints" / "best.pt").model
    torch.testing.assert_close(state["first.running_mean"], (X + 5).mean(0))
    assert torch.equal(state["second.running_mean"], torch.zeros(3))


def test_a_plateau_is_not_seen_after_steps() -> None:
    (mistake,) = config_issues("scheduler=plateau", "scheduler.interval=step")
    assert mistake == "scheduler.interval='step': ReduceLROnPlateau steps once per epoch; allowed: epoch"
