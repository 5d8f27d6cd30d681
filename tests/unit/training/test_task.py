"""Tasks of their own: several optimizers, none, wrong step outputs and options."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from app.config.instantiate import Instantiator
from app.data.loaders import make_loader
from app.experiment.factory import make_components
from app.runtime.errors import UserError
from app.runtime.nested import Nested
from app.training.limits import TrainingLimits
from app.training.optim.optim_wrapper import OptimWrapper, OptimWrapperDict
from app.training.step_values import average
from app.training.supervised import SupervisedTask
from app.training.task import StepOutput, Task
from app.training.trainer import Trainer
from tests.support.own_task import OWN_TASK_ARGUMENTS, write_own_task
from tests.support.points import X, Y, accuracy, fit, make_optimizers
from tests.support.runs import job_for


class TwoOptimizerTask(Task):
    """Two submodules with an optimizer each; the second is trained on outputs of the first."""

    def train_step(self, batch: Nested) -> StepOutput:
        x, _ = batch
        assert self.optimizers is not None
        code = self.model.code(x)  # type: ignore[operator]
        first = (code - x).square().mean()
        self.optimizers["code"].step(first, len(x))
        second = (self.model.judge(self.model.code(x)) - 1).square().mean()  # type: ignore[operator]
        self.optimizers["judge"].step(second, len(x))
        values = {"loss": average(first + second, len(x)), "judge_loss": average(second, len(x))}
        return StepOutput(values)

    def eval_step(self, stage: str, batch: Nested) -> StepOutput:
        code = self.model.code(batch[0])  # type: ignore[operator]
        return self.step_output(stage, code, batch[1], (code - batch[0]).square().mean())


def test_task_with_two_optimizers_trains_each_on_its_own_loss(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"code": nn.Linear(4, 4), "judge": nn.Linear(4, 1)})
    model.code.weight.data.zero_()  # type: ignore[union-attr, operator]
    leaked: list[Tensor] = []
    task = TwoOptimizerTask(model)
    optimizers = {
        name: torch.optim.SGD(model[name].parameters(), lr=rate)
        for name, rate in (("code", 0.1), ("judge", 0.01))
    }
    task.prepare_training(
        OptimWrapperDict(
            {n: OptimWrapper(o, owns_all_parameters=False) for n, o in optimizers.items()}
        )
    )
    task.optimizers["judge"].optimizer.register_step_pre_hook(
        lambda *_: leaked.extend(p.grad for p in model["code"].parameters() if p.grad is not None)
    )
    summary = fit(task, tmp_path, TensorDataset(X, Y), 2)
    assert leaked == []  # the judge's loss has no gradient in the other submodule
    assert summary["judge_loss"].notna().sum() == 2
    train = summary[summary["stage"] == "train"]["loss_mean"]
    assert train.iloc[1] < train.iloc[0]
    assert task.optimizers.lrs() == {"lr_code": 0.1, "lr_judge": 0.01}


def test_evaluate_without_optimizer_returns_metrics(tmp_path: Path) -> None:
    task = SupervisedTask(nn.Linear(4, 2), F.cross_entropy, {"test": {"accuracy": accuracy}})
    row = Trainer(task, TrainingLimits(max_epochs=1), tmp_path).evaluate(
        make_loader(TensorDataset(X, Y), 25)
    )
    outputs = task.model(X)
    assert row["loss_mean"][0] == pytest.approx(F.cross_entropy(outputs, Y).item(), rel=1e-6)
    assert row["accuracy"][0] == pytest.approx((outputs.argmax(1) == Y).float().mean().item())


class MissingLossTask(SupervisedTask):
    """Its steps do not return what they should."""

    def train_step(self, batch: Nested) -> StepOutput:
        super().train_step(batch)
        return None  # type: ignore[return-value]

    def eval_step(self, stage: str, batch: Nested) -> StepOutput:
        values = super().eval_step(stage, batch).values
        return StepOutput({name: value for name, value in values.items() if name != "loss"})


def test_step_output_without_loss_is_rejected_in_the_sanity_check(tmp_path: Path) -> None:
    task = MissingLossTask(nn.Linear(4, 2), F.cross_entropy, {"valid": {"accuracy": accuracy}})
    task.prepare_training(make_optimizers(task.model))
    with pytest.raises(
        UserError, match=r"task: MissingLossTask\.eval_step must return .* got \['accuracy'\]"
    ):
        fit(task, tmp_path, TensorDataset(X, Y))
    with pytest.raises(
        UserError, match=r"task: MissingLossTask\.train_step must return .* a NoneType"
    ):
        Trainer(task, TrainingLimits(max_epochs=1), tmp_path).fit(
            make_loader(TensorDataset(X, Y), 10)
        )


@pytest.fixture
def own_task(tmp_cwd: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return write_own_task(tmp_cwd, monkeypatch)


def test_own_task_with_kwargs_receives_its_options_and_the_usual_arguments(own_task: Path) -> None:
    text = "defaults: [supervised, _self_]\n_target_: own_task.NoisyTask\nnoise: 0.5\n"
    (own_task / "conf" / "task" / "noisy.yaml").write_text(text)
    job = job_for(*OWN_TASK_ARGUMENTS, "task=noisy", "trainer.precision=bf16")
    components = make_components(job.config, Instantiator(job.trusted), torch.device("cpu"))
    assert components.task.precision.name == "bf16"
    assert list(components.task.metrics["valid"].output_metrics) == ["accuracy", "total_correct"]
    assert vars(components.task)["noise"] == 0.5
