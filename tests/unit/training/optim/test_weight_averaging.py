"""Moving averages and means of the weights, and where they are used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import TensorDataset

from app.config.schema import FreezeConfig, GoalConfig
from app.data.loaders import make_loader
from app.training.checkpoint.checkpoint import load_checkpoint
from app.training.limits import TrainingLimits
from app.training.optim.freezing import FreezeSchedule
from app.training.optim.optim_wrapper import OptimWrapper, OptimWrapperDict
from app.training.optim.weight_averaging import (
    ExponentialMovingAverage,
    StochasticWeightAveraging,
    WeightAveraging,
)
from app.training.supervised import SupervisedTask
from app.training.trainer import Trainer
from tests.support.runs import config_issues
from tests.support.toy_training import DATA, X, Y, make_mlp, make_trainer


def test_ema_is_equal_to_that_of_torch(tmp_path: Path) -> None:
    model = make_mlp(batchnorm=True)
    averaging = ExponentialMovingAverage(model, decay=0.9)
    reference = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    trainer = make_trainer(tmp_path, model, averaging=averaging)
    apply = trainer.optimizers.single.apply

    def apply_and_update_reference() -> None:
        apply()
        reference.update_parameters(model)

    trainer.optimizers.single.apply = apply_and_update_reference  # type: ignore[method-assign]
    trainer.fit(make_loader(DATA, 8))
    expected = reference.module.state_dict()
    assert averaging.num_averaged == 24
    expected.pop("1.num_batches_tracked")  # torch also averages integers
    for name in expected:
        torch.testing.assert_close(averaging.average[name], expected[name])


def test_ema_is_validated_and_saved_as_best_while_training_continues_without_it(
    tmp_path: Path,
) -> None:
    plain, averaged = make_mlp(), make_mlp()
    make_trainer(tmp_path / "a", plain).fit(make_loader(DATA, 8))
    averaging = ExponentialMovingAverage(averaged, decay=0.5)
    trainer = make_trainer(
        tmp_path / "b", averaged, averaging=averaging, goal=GoalConfig("loss", "min")
    )
    summary = trainer.fit(make_loader(DATA, 8), make_loader(DATA, 8))
    assert torch.equal(plain[0].weight, averaged[0].weight)  # type: ignore[arg-type]
    best = load_checkpoint(tmp_path / "b" / "checkpoints" / "best.safetensors")
    torch.testing.assert_close(best.model["0.weight"], averaging.average["0.weight"])
    assert not torch.equal(best.model["0.weight"], averaged[0].weight)  # type: ignore[arg-type]
    trainer.state.load_best_weights()
    again = trainer.evaluate(make_loader(DATA, 8), "valid")["loss_mean"][0]
    assert again == summary[summary["stage"] == "valid"]["loss_mean"].min()
    last = load_checkpoint(tmp_path / "b" / "checkpoints" / "last.safetensors")
    assert last.training is not None
    torch.testing.assert_close(last.model["0.weight"], plain[0].weight.detach())  # type: ignore[union-attr, operator]
    assert last.training["averaging"]["num_averaged"] == 24


def test_swa_is_the_mean_of_epochs_and_recomputes_batch_norm_statistics(tmp_path: Path) -> None:
    model = make_mlp(batchnorm=True)
    averaging = StochasticWeightAveraging(model, 2)
    trainer = make_trainer(tmp_path, model, 4, averaging=averaging, goal=GoalConfig("loss", "min"))
    weights: list[Tensor] = []
    on_epoch_end = trainer.steps.averaging.on_epoch_end

    def record_weights(epoch: int) -> None:
        weights.append(model[0].weight.detach().clone())  # type: ignore[union-attr, operator]
        on_epoch_end(epoch)

    trainer.steps.averaging.on_epoch_end = record_weights  # type: ignore[method-assign]
    trainer.fit(make_loader(DATA, 16), make_loader(DATA, 16))
    expected = torch.stack(weights[1:]).mean(0)
    torch.testing.assert_close(trainer.steps.averaging.average["0.weight"], expected)
    with trainer.averaged_weights(make_loader(DATA, 64), 5):
        outputs = model[0](X)
        torch.testing.assert_close(model[1].running_mean, outputs.mean(0))
        torch.testing.assert_close(model[1].running_var, outputs.var(0))


def test_swapped_in_without_average_copies_nothing() -> None:
    model = make_mlp()
    before = model[0].weight.data_ptr()  # type: ignore[union-attr, operator]
    with WeightAveraging(model).swapped_in():
        assert model[0].weight.data_ptr() == before  # type: ignore[union-attr, operator]


class TwoNorms(nn.Module):
    """Takes two inputs, each with batch norms of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        self.second.plain = nn.BatchNorm1d(3, affine=False)
        self.third = nn.BatchNorm1d(3, affine=False)  # has statistics, but no parameters
        self.last = nn.Linear(3, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        outputs: Tensor = self.last(
            self.first(a) + self.second.plain(self.second(b)) + self.third(b)
        )
        return outputs


def test_swa_recomputes_statistics_of_several_inputs_but_not_of_frozen_norms(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    model = TwoNorms()
    task = SupervisedTask(model, nn.CrossEntropyLoss(), inputs=[0, 0])
    task.prepare_training(
        OptimWrapperDict(OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1)))
    )
    trainer = Trainer(
        task,
        TrainingLimits(max_epochs=2),
        tmp_path,
        averaging=StochasticWeightAveraging(model, 1),
        freezing=FreezeSchedule(model, {"second": FreezeConfig("second")}),
    )
    trainer.fit(make_loader(TensorDataset(X + 5, Y), 16))
    state = load_checkpoint(tmp_path / "checkpoints" / "best.safetensors").model
    torch.testing.assert_close(state["first.running_mean"], (X + 5).mean(0))
    torch.testing.assert_close(state["third.running_mean"], (X + 5).mean(0))
    for name in ("second", "second.plain"):
        assert torch.equal(state[f"{name}.running_mean"], torch.zeros(3))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("average=ema", "average.decay=1.5"), "decay=1.5 must be at least 0 and below 1"),
        (("average=swa", "average.start_epoch=0"), "start_epoch=0 must be at least 1"),
        (("average=emma",), "did you mean 'ema'"),
    ],
)
def test_config_with_invalid_average_is_rejected(overrides: tuple[str, ...], message: str) -> None:
    assert any(message in issue for issue in config_issues(*overrides))


def test_ema_warmup_limits_the_decay_by_the_number_of_updates() -> None:
    model = nn.Linear(1, 1, bias=False)
    averaging = ExponentialMovingAverage(model, decay=0.5, warmup=True)
    expected = None
    for step, value in enumerate((1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0), 1):
        with torch.no_grad():
            model.weight.fill_(value)
        decay = min(0.5, step / (step + 9))
        expected = value if expected is None else decay * expected + (1 - decay) * value
        averaging.update(1, step)
        if step == 1:
            assert averaging.next_decay == 2 / 11
    assert averaging.average["weight"].item() == pytest.approx(expected)
    assert averaging.next_decay == 0.5
    assert ExponentialMovingAverage(model, decay=0.5).next_decay == 0.5
