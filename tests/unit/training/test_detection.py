"""The task of detectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torchmetrics import MeanMetric

from app.models.fcos import FCOS
from app.runtime.errors import UserError
from app.training.detection import DetectionTask
from app.training.optim.optim_wrapper import OptimWrapper, OptimWrapperDict
from app.training.step_values import Average


def make_batch() -> tuple[Tensor, dict[str, Tensor]]:
    targets = {
        "boxes": torch.tensor([[[4.0, 4.0, 20.0, 20.0]], [[0.0, 0.0, 0.0, 0.0]]]),
        "labels": torch.tensor([[0], [-1]]),
        "crowd": torch.zeros(2, 1, dtype=torch.bool),
    }
    return torch.rand(2, 3, 32, 32), targets


def make_task(**options: Any) -> DetectionTask:
    torch.manual_seed(0)
    task = DetectionTask(FCOS(2, channels=(8, 32)), **options)
    optimizer = OptimWrapper(SGD(task.model.parameters(), lr=0.01))
    task.prepare_training(OptimWrapperDict(optimizer))
    return task


def test_train_step_gives_each_loss_and_their_weighted_sum() -> None:
    weights = {"bbox_ctrness": 0.5, "classification": 2.0}
    task = make_task(loss_weights=weights)
    before = [parameter.clone() for parameter in task.model.parameters()]
    output = task.train_step(make_batch())
    values = {name: v.value.item() for name, v in output.values.items() if isinstance(v, Average)}
    assert {*values} == {"loss", "classification", "bbox_regression", "bbox_ctrness"}
    expected = sum(weights.get(n, 1.0) * value for n, value in values.items() if n != "loss")
    assert values["loss"] == pytest.approx(expected)
    assert output.num_samples == 2
    after = task.model.parameters()
    assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_eval_step_gives_boxes_and_no_loss() -> None:
    task = make_task()
    task.model.eval()
    with torch.no_grad():
        output = task.eval_step("valid", make_batch())
        predicted = task.predict_step(make_batch())
    loss = output.values["loss"]
    assert isinstance(loss, Average)
    assert loss.value.isnan()
    assert output.num_samples == 2
    assert {*output.outputs} == {*predicted} == {"boxes", "labels", "scores"}


def test_unknown_loss_weight_is_refused() -> None:
    task = make_task(loss_weights={"clasification": 2.0})
    with pytest.raises(UserError, match=r"loss_weights.clasification .*did you mean 'classificat"):
        task.train_step(make_batch())


def test_metrics_of_training_are_refused() -> None:
    with pytest.raises(ValueError, match=r"metric.train has mean, but a detector returns losses"):
        DetectionTask(nn.Identity(), {"train": {"mean": MeanMetric()}})
