"""Classification models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from app.models.cnn import CNN
from app.models.lenet import LeNet
from app.models.mlp import MLP
from app.models.resnet import ResNet18


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (LeNet(10), (1, 28, 28)),
        (LeNet(10, 3), (3, 32, 32)),
        (MLP(10, [1, 28, 28], [16, 8], dropout=0.1), (1, 28, 28)),
        (MLP(10, [4], []), (4,)),
        (CNN(10, 3, [8, 8]), (3, 32, 32)),
        (ResNet18(10, 1, width=8), (1, 28, 28)),
    ],
)
def test_classifier_gives_logit_per_class_and_all_parameters_get_gradients(
    model: nn.Module, shape: tuple[int, ...]
) -> None:
    outputs = model(torch.rand(4, *shape))
    assert outputs.shape == (4, 10)
    outputs.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
