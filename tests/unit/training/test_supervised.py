"""Supervised tasks: batches and outputs of any structure, overridden steps, and wrong parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from app.config.instantiate import Instantiator
from app.data.loaders import make_loader
from app.data.mix import MixUpCutMix
from app.experiment.factory import make_components
from app.losses.weighted_sum import Term
from app.metrics.output_metric import OutputMetric
from app.runtime.errors import UserError
from app.runtime.nested import Nested
from app.training.limits import TrainingLimits
from app.training.optim.optim_wrapper import OptimWrapper, OptimWrapperDict
from app.training.precision import Precision
from app.training.supervised import SupervisedTask
from app.training.task import StepOutput
from app.training.trainer import Trainer
from tests.support import toy_training as toy
from tests.support.points import X, Y, accuracy, fit, make_optimizers
from tests.support.runs import config_issues, job_for


class DictDataset(Dataset[dict[str, Any]]):
    """Samples that are nested dicts."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "points": {"left": X[index, :2], "right": X[index, 2:]},
            "wanted": [Y[index], X[index]],
        }


class TwoInputs(nn.Module):
    """Takes two inputs by name, and returns a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.digit, self.rest = nn.Linear(4, 2), nn.Linear(4, 4)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Any]:
        x = torch.cat([left, right], 1)
        return {"class": self.digit(x), "more": (self.rest(x), x)}


def test_nested_batch_named_inputs_and_several_outputs_are_trained(tmp_path: Path) -> None:
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
    task.prepare_training(make_optimizers(task.model))
    summary = fit(task, tmp_path, DictDataset(), epochs=8)
    train, valid = (summary[summary["stage"] == stage] for stage in ("train", "valid"))
    total = 2 * train["entropy"] + 0.5 * train["copy"]
    torch.testing.assert_close(torch.tensor(total.values), torch.tensor(train["loss_mean"].values))
    assert valid["accuracy"].iloc[-1] > 0.9


def test_list_of_inputs_is_passed_as_positional_arguments() -> None:
    model = nn.Bilinear(4, 4, 2)
    task = SupervisedTask(model, nn.CrossEntropyLoss(), inputs=[0, 0])
    output = task.eval_step("valid", (X, Y))
    assert torch.equal(output.outputs, model(X, X))


def test_predict_keeps_the_structure_of_the_outputs(tmp_path: Path) -> None:
    task = SupervisedTask(
        TwoInputs(),
        Term(nn.CrossEntropyLoss(), output="class"),
        inputs=["points.left", "points.right"],
    )
    predicted = Trainer(task, TrainingLimits(max_epochs=1), tmp_path).predict(
        make_loader(DictDataset(), 25)
    )
    expected = task.model(X[:, :2], X[:, 2:])
    torch.testing.assert_close(predicted["class"], expected["class"])
    torch.testing.assert_close(predicted["more"][0], expected["more"][0])


def test_batch_without_the_target_item_is_rejected() -> None:
    task = SupervisedTask(nn.Linear(4, 2), nn.CrossEntropyLoss(), targets=2)
    with pytest.raises(
        UserError, match=r"data\.inputs, data\.targets: in a batch there is no item 2"
    ):
        task.eval_step("valid", (X, Y))


class NegatedInputTask(SupervisedTask):
    """Overrides both steps: negates the inputs."""

    def train_step(self, batch: Nested) -> StepOutput:
        inputs, targets = self.unpack(batch)
        outputs = self.forward(-inputs)
        loss, terms = self.loss(outputs, targets)
        self.optimizer.step(loss, len(inputs))
        return self.step_output("train", outputs, targets, loss, terms)

    def eval_step(self, stage: str, batch: Nested) -> StepOutput:
        return super().eval_step(stage, (-batch[0], batch[1]))


def test_overridden_steps_are_used_by_fit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    one, other = nn.Linear(4, 2), nn.Linear(4, 2)
    other.load_state_dict(one.state_dict())
    tasks = (
        NegatedInputTask(one, nn.CrossEntropyLoss()),
        SupervisedTask(other, nn.CrossEntropyLoss()),
    )
    rows = []
    for number, (task, data) in enumerate(zip(tasks, (X, -X), strict=True)):
        task.prepare_training(make_optimizers(task.model))
        rows.append(fit(task, tmp_path / str(number), TensorDataset(data, Y), 2)["loss_mean"])
    assert rows[0].tolist() == rows[1].tolist()
    assert torch.equal(one.weight, other.weight)


def test_accumulation_and_clipping_apply_to_overridden_step(tmp_path: Path) -> None:
    torch.manual_seed(0)
    models = [nn.Linear(4, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    task = NegatedInputTask(models[0], nn.CrossEntropyLoss())
    task.prepare_training(make_optimizers(models[0], batch_size=10, accumulate=6, clip_norm=0.01))
    fit(task, tmp_path, TensorDataset(X, Y))
    loss = F.cross_entropy(models[1](-X), Y)
    loss.backward()
    nn.utils.clip_grad_norm_(models[1].parameters(), 0.01)
    torch.optim.SGD(models[1].parameters(), lr=0.1).step()
    torch.testing.assert_close(models[0].weight, models[1].weight)


class DtypeRecorder(nn.Linear):
    """Records the dtype of its outputs."""

    def forward(self, input: Tensor) -> Tensor:
        outputs = super().forward(input)
        self.dtype = outputs.dtype
        return outputs


def test_precision_applies_to_overridden_step_but_not_to_metrics(tmp_path: Path) -> None:
    model = DtypeRecorder(4, 2)

    def is_exact(outputs: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG001
        return torch.as_tensor((X[:2] @ X[:2].T).dtype == torch.float32).float()

    task = NegatedInputTask(
        model, nn.CrossEntropyLoss(), {"train": {"exact": is_exact}}, Precision("bf16", "cpu")
    )
    task.prepare_training(make_optimizers(model))
    summary = fit(task, tmp_path, TensorDataset(X, Y))
    assert model.dtype == torch.bfloat16
    assert model.weight.dtype == model.weight.data.dtype == torch.float32
    assert summary["exact"].iloc[0] == 1


def test_backward_runs_without_autocast(tmp_path: Path) -> None:
    is_autocast_on: list[bool] = []
    model = nn.Linear(4, 2)
    model.weight.register_hook(lambda _: is_autocast_on.append(torch.is_autocast_enabled("cpu")))
    task = NegatedInputTask(model, nn.CrossEntropyLoss(), precision=Precision("bf16", "cpu"))
    task.prepare_training(make_optimizers(model))
    fit(task, tmp_path, TensorDataset(X, Y))
    assert is_autocast_on == [False] * 6


def test_forward_after_optimizer_step_uses_the_new_weights_in_reduced_precision(
    tmp_path: Path,
) -> None:
    model = nn.Linear(4, 2)
    outputs: list[Tensor] = []

    class TwoForwardsTask(SupervisedTask):
        def train_step(self, batch: Nested) -> StepOutput:
            output = super().train_step(batch)
            outputs.extend([output.outputs, self.forward(batch[0])])
            return output

    task = TwoForwardsTask(model, nn.CrossEntropyLoss(), precision=Precision("bf16", "cpu"))
    task.prepare_training(
        OptimWrapperDict(OptimWrapper(torch.optim.SGD(model.parameters(), lr=10.0)))
    )
    fit(task, tmp_path, TensorDataset(X, Y))
    assert not torch.equal(outputs[0], outputs[1])


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
def test_loss_term_that_does_not_fit_is_rejected_by_name(term: Term, message: str) -> None:
    task = SupervisedTask(nn.Linear(4, 2), term)
    with pytest.raises(UserError, match=message):
        task.eval_step("valid", (X[:10], Y[:10]))


def test_loss_of_several_outputs_suggests_to_select_one() -> None:
    task = SupervisedTask(TwoInputs(), nn.CrossEntropyLoss(), inputs=["0", "0"])
    with pytest.raises(UserError, match=r"set loss\.main\.output to select one of the outputs"):
        task.eval_step("valid", (X[:, :2], Y))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_loss_of_any_reduction_is_a_scalar(reduction: str) -> None:
    task = SupervisedTask(nn.Linear(4, 2), nn.CrossEntropyLoss(reduction=reduction))
    loss = task.eval_step("valid", (X, Y)).values["loss"]
    mean = F.cross_entropy(task.model(X), Y)
    torch.testing.assert_close(loss.value, mean * (60 if reduction == "sum" else 1))  # type: ignore[union-attr]


def test_metric_that_does_not_fit_is_rejected_by_name(tmp_path: Path) -> None:
    metrics = {"test": {"accuracy": MulticlassAccuracy(2)}}
    task = SupervisedTask(nn.Linear(4, 4), nn.MSELoss(), metrics, targets=0)
    with pytest.raises(UserError, match=r"metric\.test\.accuracy: cannot take outputs"):
        Trainer(task, TrainingLimits(max_epochs=1), tmp_path).evaluate(
            make_loader(TensorDataset(X, Y), 10)
        )


def test_metric_with_the_name_of_a_loss_term_is_rejected() -> None:
    loss = {"accuracy": Term(F.cross_entropy), "other": Term(F.cross_entropy)}
    with pytest.raises(ValueError, match="metric 'accuracy' of valid is the column of a loss term"):
        SupervisedTask(nn.Linear(4, 2), loss, {"valid": {"accuracy": accuracy}})
    overrides = (
        "loss.cross_entropy.weight=2",
        "+metric.valid.cross_entropy={_target_: app.metrics.function.CorrectPredictions}",
    )
    assert config_issues(*overrides) == [
        "metric.valid.cross_entropy is the column of a loss term; rename it"
    ]


def test_term_named_loss_does_not_replace_the_total(tmp_path: Path) -> None:
    terms = {"loss": Term(F.cross_entropy), "other": Term(lambda o, _: o.mean() * 0 + 100.0)}
    task = SupervisedTask(nn.Linear(4, 2), terms)
    row = Trainer(task, TrainingLimits(max_epochs=1), tmp_path).evaluate(
        make_loader(TensorDataset(X, Y), 60)
    )
    assert row["loss_mean"][0] > 100
    assert "loss.loss is the name of another column; rename it" in config_issues(
        "+loss.loss={_target_: app.losses.weighted_sum.Term, "
        "function: {_target_: torch.nn.MSELoss}}"
    )


def test_metrics_receive_outputs_in_float32() -> None:
    dtypes: list[torch.dtype] = []

    def record_dtype(outputs: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG001
        dtypes.append(outputs.dtype)
        return outputs.mean()

    precision = Precision("bf16", "cpu")
    task = SupervisedTask(
        nn.Linear(4, 2), F.cross_entropy, {"valid": {"record_dtype": record_dtype}}, precision
    )
    with precision.autocast():
        output = task.eval_step("valid", (X, Y))
    assert output.outputs.dtype == torch.bfloat16
    assert dtypes == [torch.float32]


def test_loss_without_gradient_is_rejected(tmp_path: Path) -> None:
    task = SupervisedTask(nn.Linear(4, 2), lambda o, t: F.cross_entropy(o.detach(), t))
    task.prepare_training(make_optimizers(task.model))
    with pytest.raises(UserError, match="does not depend on any trainable parameter"):
        fit(task, tmp_path, TensorDataset(X, Y))


def test_mix_changes_the_loss_but_not_the_targets_of_metrics(
    tmp_path: Path,
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def mix(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        mixed = 0.75 * inputs + 0.25 * inputs.roll(1, 0)
        soft = 0.75 * F.one_hot(targets, 2) + 0.25 * F.one_hot(targets, 2).roll(1, 0)
        seen.append((mixed, soft))
        return mixed, soft

    model = toy.make_mlp()
    task = SupervisedTask(model, nn.CrossEntropyLoss(), {"train": {"accuracy": accuracy}}, mix=mix)
    task.prepare_training(
        OptimWrapperDict(OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.0)))
    )
    summary = Trainer(task, TrainingLimits(max_epochs=1), tmp_path).fit(
        make_loader(toy.DATA, 64), make_loader(toy.DATA, 64)
    )
    ((mixed, soft),) = seen
    outputs = model(mixed)
    assert summary["loss_mean"][0] == pytest.approx(F.cross_entropy(outputs, soft).item(), rel=1e-6)
    assert summary["loss_mean"][1] == pytest.approx(
        F.cross_entropy(model(toy.X), toy.Y).item(), rel=1e-6
    )
    assert summary["accuracy"][0] == pytest.approx(accuracy(outputs, toy.Y).item())


def test_mix_receives_the_epoch_of_each_step() -> None:
    mix = MixUpCutMix(2, mixup_alpha=1.0, until_epoch=3)
    task = SupervisedTask(nn.Linear(2, 2), nn.CrossEntropyLoss(), mix=mix)
    task.on_step_start(3, 7)
    assert mix.epoch == 3
    SupervisedTask(nn.Linear(2, 2), nn.CrossEntropyLoss(), mix=lambda x, y: (x, y)).on_step_start(
        1, 1
    )


def test_compile_without_a_compiler_is_one_line_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._inductor.config as inductor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    task = SupervisedTask(nn.Sequential(nn.Linear(4, 2), nn.GELU()), nn.CrossEntropyLoss())
    task.model.compile()
    with inductor.patch("cpp.cxx", ("no-such-compiler",)), pytest.raises(UserError) as caught:
        task.forward(X)
    assert str(caught.value).startswith(
        "trainer.compile: Sequential cannot be compiled: InvalidCxx"
    )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "arguments"),
    [
        ("true", {}),
        ("reduce-overhead", {"mode": "reduce-overhead"}),
        ("{backend: eager}", {"backend": "eager", "mode": None, "fullgraph": False}),
    ],
)
def test_compile_is_called_as_configured(
    value: str, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(nn.Module, "compile", lambda _, **options: calls.append(options))
    config = job_for("model=mlp", f"trainer.compile={value}").config
    make_components(config, Instantiator(), torch.device("cpu"))
    (options,) = calls
    assert options.items() >= arguments.items()
