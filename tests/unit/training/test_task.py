"""Tasks: batches and outputs of any form, own steps, several optimizers; and what goes wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from app.config.instantiate import Instantiator
from app.config.schema import GoalConfig
from app.data.loaders import load
from app.experiment.factory import make_components
from app.losses.weighted_sum import Term, WeightedSum
from app.metrics.output_metric import OutputMetric
from app.runtime.errors import UserError
from app.runtime.nested import Nested, describe, map_tensors, pick, replace, iter_tensors
from app.training.accumulator import average
from app.training.events import Callback, StepEnd
from app.training.optim.optim_wrapper import OptimWrapper, OptimWrapperDict
from app.training.plan import TrainingLimits
from app.training.precision import Precision
from app.training.supervised import SupervisedTask
from app.training.task import StepOutput, Task
from app.training.trainer import Trainer
from tests.support.own_task import FEW
from tests.support.runs import job_for, config_issues

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


def learning(model: nn.Module, **options: Any) -> OptimWrapperDict:
    return OptimWrapperDict(OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1), **options))


def fit(task: Task, folder: Path, data: Any, epochs: int = 1, **options: Any) -> pd.DataFrame:
    trainer = Trainer(task, TrainingLimits(max_epochs=epochs), folder, **options)
    return trainer.fit(load(data, 10), load(data, 10))


# ---- nested


def test_parts_are_picked_by_position_name_path_list_and_dict() -> None:
    nested = ({"a": torch.zeros(2), "b": [torch.ones(3), torch.ones(4)]}, torch.ones(5))
    assert pick(nested, None) is nested
    assert pick(nested, 1).shape == (5,)
    assert pick(nested, "0.b.1").shape == (4,)
    assert [part.shape[0] for part in pick(nested, [1, "0.a"])] == [5, 2]
    assert pick(nested, {"x": 1})["x"].shape == (5,)
    assert [len(tensor) for tensor in iter_tensors(nested)] == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (2, "there is no item 2 in a tuple of a float32 tensor of shape"),
        ("0.diget", "there is no 'diget'; available: digit; did you mean 'digit'"),
        ("1.x", "there is no 'x' in a float32 tensor"),
    ],
)
def test_a_part_that_is_not_there_is_named_with_what_is_there(key: Any, message: str) -> None:
    nested = ({"digit": torch.zeros(2)}, torch.zeros(3))
    if key == 2:
        nested = (torch.zeros(2), torch.zeros(3))  # type: ignore[assignment]
    with pytest.raises(UserError, match=message):
        pick(nested, key)


def test_a_part_is_replaced_and_the_form_stays() -> None:
    assert replace((1, 2, 3), 1, 9) == (1, 9, 3)
    assert replace([1, 2], 0, 9) == [9, 2]
    assert replace({"a": 1, "b": 2}, "b", 9) == {"a": 1, "b": 9}
    assert replace(({"a": [1, 2]}, 3), "0.a.1", 9) == ({"a": [1, 9]}, 3)
    assert replace((1, 2), -1, 9) == replace((1, 2), "1", 9) == (1, 9)
    with pytest.raises(UserError, match="there is no 'c'"):
        replace({"a": 1}, "c", 9)
    mapped = map_tensors(lambda t: t + 1, {"a": (torch.zeros(1), "text"), "b": [torch.ones(1)]})
    assert describe(mapped) == (
        "a dict of 'a': a tuple of a float32 tensor of shape [1], a str, "
        "'b': a list of a float32 tensor of shape [1]"
    )


# ---- forms of batches and outputs


class Named(Dataset[dict[str, Any]]):
    """Samples that are dicts, nested."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "points": {"left": X[index, :2], "right": X[index, 2:]},
            "wanted": [Y[index], X[index]],
        }


class TwoInputs(nn.Module):
    """Takes its inputs by name, gives a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.digit, self.rest = nn.Linear(4, 2), nn.Linear(4, 4)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Any]:
        x = torch.cat([left, right], 1)
        return {"class": self.digit(x), "more": (self.rest(x), x)}


def test_nested_batches_inputs_by_name_and_outputs_of_several_heads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = SupervisedTask(
        TwoInputs(),
        {
            "entropy": Term(nn.CrossEntropyLoss(), 2.0, output="class", target="label"),
            "copy": Term(F.mse_loss, 0.5, output="more.0", target="whole"),
        },
        {
            "valid": {
                "accuracy": OutputMetric(MulticlassAccuracy(2, average="micro"), "class", "label")
            }
        },
        inputs={"left": "points.left", "right": "points.right"},
        targets={"label": "wanted.0", "whole": "wanted.1"},
    )
    task.optimizers = learning(task.model)
    summary = fit(task, tmp_path, Named(), epochs=8)
    train, valid = (summary[summary["stage"] == stage] for stage in ("train", "valid"))
    total = 2 * train["entropy"] + 0.5 * train["copy"]
    torch.testing.assert_close(torch.tensor(total.values), torch.tensor(train["loss_mean"].values))
    assert valid["accuracy"].iloc[-1] > 0.9


def test_several_inputs_in_a_row_are_arguments() -> None:
    model = nn.Bilinear(4, 4, 2)
    task = SupervisedTask(model, nn.CrossEntropyLoss(), inputs=[0, 0])
    step = task.eval_step("valid", (X, Y))
    assert torch.equal(step.outputs, model(X, X))


def test_predictions_keep_the_form_of_the_outputs(tmp_path: Path) -> None:
    task = SupervisedTask(
        TwoInputs(),
        Term(nn.CrossEntropyLoss(), output="class"),
        inputs=["points.left", "points.right"],
    )
    found = Trainer(task, TrainingLimits(max_epochs=1), tmp_path).predict(load(Named(), 25))
    expected = task.model(X[:, :2], X[:, 2:])
    torch.testing.assert_close(found["class"], expected["class"])
    torch.testing.assert_close(found["more"][0], expected["more"][0])


def test_a_batch_without_the_part_that_is_the_target_says_which_it_has() -> None:
    task = SupervisedTask(nn.Linear(4, 2), nn.CrossEntropyLoss(), targets=2)
    with pytest.raises(
        UserError, match=r"data\.inputs, data\.targets: in a batch there is no item 2"
    ):
        task.eval_step("valid", (X, Y))


# ---- own steps


class Negative(SupervisedTask):
    """Overrides both steps: learns from inputs turned round."""

    def train_step(self, batch: Nested) -> StepOutput:
        inputs, targets = self.unpack(batch)
        outputs = self.forward(-inputs)
        loss, terms = self.loss(outputs, targets)
        self.optimizer.step(loss, len(inputs))
        return self.step_output("train", outputs, targets, loss, terms)

    def eval_step(self, stage: str, batch: Nested) -> StepOutput:
        return super().eval_step(stage, (-batch[0], batch[1]))


def test_overridden_steps_are_those_that_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    one, other = nn.Linear(4, 2), nn.Linear(4, 2)
    other.load_state_dict(one.state_dict())
    tasks = Negative(one, nn.CrossEntropyLoss()), SupervisedTask(other, nn.CrossEntropyLoss())
    rows = []
    for number, (task, data) in enumerate(zip(tasks, (X, -X), strict=True)):
        task.optimizers = learning(task.model)
        rows.append(fit(task, tmp_path / str(number), TensorDataset(data, Y), 2)["loss_mean"])
    assert rows[0].tolist() == rows[1].tolist()
    assert torch.equal(one.weight, other.weight)


class Alternating(Task):
    """From scratch: two parts with an optimizer each, one learning from what the other gives."""

    def train_step(self, batch: Nested) -> StepOutput:
        x, _ = batch
        assert self.optimizers is not None
        code = self.model.code(x)  # type: ignore[operator]
        first = (code - x).square().mean()
        self.optimizers["code"].step(first, len(x))
        second = (self.model.judge(self.model.code(x)) - 1).square().mean()  # type: ignore[operator]
        self.optimizers["judge"].step(second, len(x))
        means = {"loss": average(first + second, len(x)), "judge_loss": average(second, len(x))}
        return StepOutput(means)

    def eval_step(self, stage: str, batch: Nested) -> StepOutput:
        code = self.model.code(batch[0])  # type: ignore[operator]
        return self.step_output(stage, code, batch[1], (code - batch[0]).square().mean())


def test_a_task_from_scratch_with_two_optimizers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"code": nn.Linear(4, 4), "judge": nn.Linear(4, 1)})
    model.code.weight.data.zero_()  # type: ignore[union-attr, operator]
    seen: list[Tensor] = []
    task = Alternating(model)
    optimizers = {
        name: torch.optim.SGD(model[name].parameters(), lr=rate)
        for name, rate in (("code", 0.1), ("judge", 0.01))
    }
    task.optimizers = OptimWrapperDict(
        {n: OptimWrapper(o, owns_all_parameters=False) for n, o in optimizers.items()}
    )
    task.optimizers["judge"].optimizer.register_step_pre_hook(
        lambda *_: seen.extend(p.grad for p in model["code"].parameters() if p.grad is not None)
    )
    summary = fit(task, tmp_path, TensorDataset(X, Y), 2)
    assert seen == []  # the judge's loss reaches nobody else
    assert summary["judge_loss"].notna().sum() == 2
    train = summary[summary["stage"] == "train"]["loss_mean"]
    assert train.iloc[1] < train.iloc[0]
    assert task.optimizers.lrs() == {"lr_code": 0.1, "lr_judge": 0.01}


def test_a_task_for_testing_only_needs_no_optimizer(tmp_path: Path) -> None:
    task = SupervisedTask(nn.Linear(4, 2), F.cross_entropy, {"test": {"right": right}})
    row = Trainer(task, TrainingLimits(max_epochs=1), tmp_path).evaluate(
        load(TensorDataset(X, Y), 25)
    )
    outputs = task.model(X)
    assert row["loss_mean"][0] == pytest.approx(F.cross_entropy(outputs, Y).item(), rel=1e-6)
    assert row["right"][0] == pytest.approx((outputs.argmax(1) == Y).float().mean().item())


def right(outputs: Tensor, targets: Tensor) -> Tensor:
    """A plain function as a metric."""
    return (outputs.argmax(1) == targets).float().mean()


def test_accumulation_and_clipping_apply_to_an_own_step(tmp_path: Path) -> None:
    torch.manual_seed(0)
    models = [nn.Linear(4, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    several = Negative(models[0], nn.CrossEntropyLoss())
    several.optimizers = learning(models[0], batch_size=10, accumulate=6, clip_norm=0.01)
    fit(several, tmp_path, TensorDataset(X, Y))
    loss = F.cross_entropy(models[1](-X), Y)
    loss.backward()
    nn.utils.clip_grad_norm_(models[1].parameters(), 0.01)
    torch.optim.SGD(models[1].parameters(), lr=0.1).step()
    torch.testing.assert_close(models[0].weight, models[1].weight)


class Recorder(nn.Linear):
    """Remembers the type that it computes in."""

    def forward(self, input: Tensor) -> Tensor:
        outputs = super().forward(input)
        self.dtype = outputs.dtype
        return outputs


def test_precision_applies_to_an_own_step_and_metrics_stay_outside(tmp_path: Path) -> None:
    model = Recorder(4, 2)

    def is_exact(outputs: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG001
        return torch.as_tensor((X[:2] @ X[:2].T).dtype == torch.float32).float()

    task = Negative(
        model, nn.CrossEntropyLoss(), {"train": {"exact": is_exact}}, Precision("bf16", "cpu")
    )
    task.optimizers = learning(model)
    summary = fit(task, tmp_path, TensorDataset(X, Y))
    assert model.dtype == torch.bfloat16
    assert model.weight.dtype == model.weight.data.dtype == torch.float32
    assert summary["exact"].iloc[0] == 1


def test_gradients_are_computed_outside_the_reduced_precision(tmp_path: Path) -> None:
    inside: list[bool] = []
    model = nn.Linear(4, 2)
    model.weight.register_hook(lambda _: inside.append(torch.is_autocast_enabled("cpu")))
    task = Negative(model, nn.CrossEntropyLoss(), precision=Precision("bf16", "cpu"))
    task.optimizers = learning(model)
    fit(task, tmp_path, TensorDataset(X, Y))
    assert inside == [False] * 6


def test_weights_changed_within_a_step_are_used_in_reduced_precision(tmp_path: Path) -> None:
    model = nn.Linear(4, 2)
    gave: list[Tensor] = []

    class Twice(SupervisedTask):
        def train_step(self, batch: Nested) -> StepOutput:
            step = super().train_step(batch)
            gave.extend([step.outputs, self.forward(batch[0])])
            return step

    task = Twice(model, nn.CrossEntropyLoss(), precision=Precision("bf16", "cpu"))
    task.optimizers = OptimWrapperDict(OptimWrapper(torch.optim.SGD(model.parameters(), lr=10.0)))
    fit(task, tmp_path, TensorDataset(X, Y))
    assert not torch.equal(gave[0], gave[1])


# ---- what goes wrong


class Forgetful(SupervisedTask):
    """Its steps forget what they should give back."""

    def train_step(self, batch: Nested) -> StepOutput:
        super().train_step(batch)
        return None  # type: ignore[return-value]

    def eval_step(self, stage: str, batch: Nested) -> StepOutput:
        values = super().eval_step(stage, batch).values
        return StepOutput({name: value for name, value in values.items() if name != "loss"})


def test_a_step_that_forgets_the_loss_is_named_in_the_sanity_pass(tmp_path: Path) -> None:
    task = Forgetful(nn.Linear(4, 2), F.cross_entropy, {"valid": {"right": right}})
    task.optimizers = learning(task.model)
    with pytest.raises(
        UserError, match=r"task: Forgetful\.eval_step must return .* gave \['right'\]"
    ):
        fit(task, tmp_path, TensorDataset(X, Y))
    with pytest.raises(UserError, match=r"task: Forgetful\.train_step must return .* a NoneType"):
        Trainer(task, TrainingLimits(max_epochs=1), tmp_path).fit(load(TensorDataset(X, Y), 10))


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (Term(F.cross_entropy, output="digit"), "loss.main: cannot take .*there is no 'digit'"),
        (Term(F.cross_entropy, target=1), "loss.main: cannot take .*there is no item 1"),
        (Term(F.l1_loss, target=0), "loss.main: cannot take .*float32 tensor of shape \\[10, 2\\]"),
        (
            Term(lambda o, t: (o, t)),
            "loss.main: must return a floating-point tensor.* it returned a tuple",
        ),
        (
            Term(lambda _, t: t.sum()),
            "loss.main: must return a floating-point tensor.* it returned a int64 tensor",
        ),
    ],
)
def test_a_term_that_does_not_fit_is_named(term: Term, message: str) -> None:
    task = SupervisedTask(nn.Linear(4, 2), term)
    with pytest.raises(UserError, match=message):
        task.eval_step("valid", (X[:10], Y[:10]))


def test_outputs_of_several_parts_ask_for_one_of_them() -> None:
    task = SupervisedTask(TwoInputs(), nn.CrossEntropyLoss(), inputs=["0", "0"])
    with pytest.raises(UserError, match=r"set loss\.main\.output to select one of the outputs"):
        task.eval_step("valid", (X[:, :2], Y))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_losses_of_every_reduction(reduction: str) -> None:
    task = SupervisedTask(nn.Linear(4, 2), nn.CrossEntropyLoss(reduction=reduction))
    found = task.eval_step("valid", (X, Y)).values["loss"]
    mean = F.cross_entropy(task.model(X), Y)
    torch.testing.assert_close(found.value, mean * (60 if reduction == "sum" else 1))  # type: ignore[union-attr]


def test_a_metric_that_does_not_fit_is_named(tmp_path: Path) -> None:
    metrics = {"test": {"accuracy": MulticlassAccuracy(2)}}
    task = SupervisedTask(nn.Linear(4, 4), nn.MSELoss(), metrics, targets=0)
    with pytest.raises(UserError, match=r"metric\.test\.accuracy: cannot take outputs"):
        Trainer(task, TrainingLimits(max_epochs=1), tmp_path).evaluate(
            load(TensorDataset(X, Y), 10)
        )


def test_a_goal_that_an_own_task_does_not_measure_is_named_before_training(tmp_path: Path) -> None:
    told: list[str] = []

    class Ear(Callback):
        def on_step_end(self, step: StepEnd) -> None:
            told.append(step.stage)

    task = SupervisedTask(nn.Linear(4, 2), F.cross_entropy, {"valid": {"right": right}})
    task.optimizers = learning(task.model)
    with pytest.raises(UserError, match=r"'rigth' is not measured .*did you mean 'right'"):
        fit(task, tmp_path, TensorDataset(X, Y), goal=GoalConfig("rigth", "max"), callbacks=Ear())
    assert told == []


def test_data_without_a_batch_is_named(tmp_path: Path) -> None:
    task = SupervisedTask(nn.Linear(4, 2), F.cross_entropy)
    task.optimizers = learning(task.model)
    with pytest.raises(UserError, match="the train data has no batches"):
        fit(task, tmp_path, TensorDataset(X[:0], Y[:0]))


def test_an_own_task_may_pass_on_what_it_does_not_name(own_task: Path) -> None:
    text = "defaults: [supervised, _self_]\n_target_: own_task.Noisy\nnoise: 0.5\n"
    (own_task / "conf" / "task" / "noisy.yaml").write_text(text)
    job = job_for(*FEW, "task=noisy", "trainer.precision=bf16")
    parts = make_components(job.config, Instantiator(job.trusted), torch.device("cpu"))
    assert parts.task.precision.name == "bf16"
    assert list(parts.task.metrics["valid"].output_metrics) == ["accuracy", "total_correct"]
    assert vars(parts.task)["noise"] == 0.5


def test_a_single_plain_term_has_no_column_of_its_own() -> None:
    loss = WeightedSum({"a": Term(nn.CrossEntropyLoss(), 2.0)})
    total, terms = loss(X[:, :2], Y)
    assert terms["a"] * 2 == total
    assert WeightedSum({"a": Term(nn.CrossEntropyLoss())})(X[:, :2], Y)[1] == {}


def test_a_metric_may_not_have_the_name_of_a_term() -> None:
    loss = {"right": Term(F.cross_entropy), "other": Term(F.cross_entropy)}
    with pytest.raises(ValueError, match="metric 'right' of valid is the column of a loss term"):
        SupervisedTask(nn.Linear(4, 2), loss, {"valid": {"right": right}})
    words = (
        "loss.cross_entropy.weight=2",
        "+metric.valid.cross_entropy={_target_: app.metrics.function.CorrectPredictions}",
    )
    assert config_issues(*words) == [
        "metric.valid.cross_entropy is the column of a loss term; rename it"
    ]


def test_a_term_that_is_called_loss_does_not_hide_the_total(tmp_path: Path) -> None:
    terms = {"loss": Term(F.cross_entropy), "other": Term(lambda o, _: o.mean() * 0 + 100.0)}
    task = SupervisedTask(nn.Linear(4, 2), terms)
    row = Trainer(task, TrainingLimits(max_epochs=1), tmp_path).evaluate(
        load(TensorDataset(X, Y), 60)
    )
    assert row["loss_mean"][0] > 100
    assert "loss.loss is the name of another column; rename it" in config_issues(
        "+loss.loss={_target_: app.losses.weighted_sum.Term, "
        "function: {_target_: torch.nn.MSELoss}}"
    )


def test_metrics_see_outputs_of_reduced_precision_in_full_width() -> None:
    seen: list[torch.dtype] = []

    def look(outputs: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG001
        seen.append(outputs.dtype)
        return outputs.mean()

    precision = Precision("bf16", "cpu")
    task = SupervisedTask(nn.Linear(4, 2), F.cross_entropy, {"valid": {"look": look}}, precision)
    with precision.autocast():
        step = task.eval_step("valid", (X, Y))
    assert step.outputs.dtype == torch.bfloat16
    assert seen == [torch.float32]


def test_a_loss_without_anything_to_learn_is_an_error(tmp_path: Path) -> None:
    task = SupervisedTask(nn.Linear(4, 2), lambda o, t: F.cross_entropy(o.detach(), t))
    task.optimizers = learning(task.model)
    with pytest.raises(UserError, match="does not depend on any parameter that learns"):
        fit(task, tmp_path, TensorDataset(X, Y))


class Random(SupervisedTask):
    """Measures with random numbers."""

    def eval_step(self, stage: str, batch: Nested) -> StepOutput:
        return super().eval_step(stage, (batch[0] + torch.randn(batch[0].shape), batch[1]))


def test_what_is_drawn_in_an_evaluation_depends_on_seed_stage_and_epoch_alone(
    tmp_path: Path,
) -> None:
    task = Random(nn.Linear(4, 2), F.cross_entropy)
    data = load(TensorDataset(X, Y), 10)

    def loss(seed: int, epoch: int) -> float:
        trainer = Trainer(task, TrainingLimits(max_epochs=1), tmp_path, seed=seed)
        torch.rand(epoch)
        return float(trainer.evaluate(data, "test", epoch)["loss_mean"][0])

    assert loss(0, 3) == loss(0, 3)
    assert len({loss(0, 3), loss(0, 4), loss(1, 3)}) == 3
