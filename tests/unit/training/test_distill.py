"""Distillation: the loss of a step, and what it leaves alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from app.runtime.errors import UserError
from app.training.distill import DistillTask
from app.training.precision import Precision
from tests.support.points import X, Y, accuracy, fit, make_optimizers


def make_task(teacher: nn.Module, **options: Any) -> DistillTask:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    task = DistillTask(teacher, 3.0, 0.25, model=model, loss=nn.CrossEntropyLoss(), **options)
    task.prepare_training(make_optimizers(model))
    return task


def make_teacher() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))


def test_distill_step_follows_the_gradient_of_the_weighted_losses() -> None:
    task = make_task(make_teacher())
    expected = copy.deepcopy(task.model)
    output = task.train_step((X, Y))
    assert task.teacher is not None
    logits, taught = expected(X), task.teacher(X)
    q, p = (logits / 3).log_softmax(1), (taught / 3).log_softmax(1)
    divergence = F.kl_div(q, p, reduction="batchmean", log_target=True) * 3**2
    loss = 0.75 * F.cross_entropy(logits, Y) + 0.25 * divergence
    loss.backward()
    torch.optim.SGD(expected.parameters(), lr=0.1).step()
    torch.testing.assert_close(task.model.state_dict(), expected.state_dict())
    columns = {name: average.value for name, average in output.values.items()}  # type: ignore[union-attr]
    torch.testing.assert_close(columns["loss"], loss.detach())
    torch.testing.assert_close(columns["distillation_loss"], divergence.detach())
    torch.testing.assert_close(columns["task_loss"], F.cross_entropy(logits, Y).detach())


def test_distill_of_accumulated_batches_with_class_weights_is_that_of_one(tmp_path: Path) -> None:
    models = []
    for size in (60, 20):
        torch.manual_seed(0)
        loss = nn.CrossEntropyLoss(torch.tensor([0.1, 5.0]))
        task = DistillTask(make_teacher(), model=nn.Linear(4, 2), loss=loss)
        task.prepare_training(make_optimizers(task.model, batch_size=size, accumulate=60 // size))
        fit(task, tmp_path / str(size), TensorDataset(X, Y), batch_size=size)
        models.append(task.model.state_dict())
    torch.testing.assert_close(models[1], models[0])


def test_distill_leaves_the_teacher_as_it_is_and_evaluates_without_it(tmp_path: Path) -> None:
    task = make_task(make_teacher(), metrics={"valid": {"accuracy": accuracy}})
    assert task.teacher is not None
    before = copy.deepcopy(task.teacher.state_dict())
    summary = fit(task, tmp_path, TensorDataset(X, Y), epochs=3)
    torch.testing.assert_close(task.teacher.state_dict(), before, rtol=0, atol=0)
    assert not any(module.training for module in task.teacher.modules())
    assert all(parameter.grad is None for parameter in task.teacher.parameters())
    assert task.parameters().keys() == {"weight", "bias"}
    assert task.state_dict().keys() == {"loss"}
    valid = summary[summary["stage"] == "valid"].iloc[-1]
    loss = F.cross_entropy(task.model(X), Y)
    assert valid["loss_mean"] == pytest.approx(float(loss.detach()), abs=1e-6)


class InputRecorder(nn.Linear):
    """Records its inputs and the dtype of its outputs."""

    def forward(self, input: Tensor) -> Tensor:
        outputs = super().forward(input)
        self.inputs, self.dtype, self.has_grad = input, outputs.dtype, torch.is_grad_enabled()
        return outputs


def test_distill_teacher_gets_the_mixed_inputs_in_the_precision_of_the_model(
    tmp_path: Path,
) -> None:
    teacher = InputRecorder(4, 2)
    options = {"mix": lambda inputs, targets: (inputs.neg(), targets)}
    task = make_task(teacher, precision=Precision("bf16", "cpu"), **options)
    fit(task, tmp_path, TensorDataset(X[:10], Y[:10]))
    assert {tuple(row) for row in teacher.inputs.tolist()} == {tuple(r) for r in (-X[:10]).tolist()}
    assert (teacher.dtype, teacher.has_grad) == (torch.bfloat16, False)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (nn.Linear(4, 3), r"shape \[60, 3\].* must be logits of the same shape"),
        (nn.Linear(5, 2), r"^teacher: Linear cannot take .*\[60, 4\]"),
        (nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), r"\[60\].* must be logits of the same"),
        (nn.LSTM(4, 2), r"^teacher: its outputs .* must be logits"),
    ],
)
def test_distill_teacher_of_other_shapes_is_refused(teacher: nn.Module, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_task(teacher).train_step((X, Y))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, r"alpha=1\.5 is not valid; allowed: 0 to 1"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"loss": nn.BCEWithLogitsLoss()}, "outputs of BCEWithLogitsLoss are no logits of classes"),
        ({"metrics": {"train": {"task_loss": accuracy}}}, "'task_loss' is the name of another"),
    ],
)
def test_distill_invalid_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillTask(**{"model": nn.Linear(4, 2), "loss": nn.CrossEntropyLoss(), **options})
