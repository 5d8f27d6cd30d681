"""A model by module, against numbers that follow from its definition."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from app.callbacks.model_summary import describe
from app.data.batch import BatchLoader
from app.runtime.seed import rng_state
from app.training.model_summary import Summary, optimizer_state_bytes, summarize_model
from app.training.supervised import SupervisedTask
from app.training.task import Task


class OneBatch(BatchLoader):
    """Loader of random samples."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape

    def first(self, count: int) -> tuple[Tensor, Tensor]:
        return torch.rand(count, *self.shape), torch.zeros(count, dtype=torch.long)


class Noisy(nn.Module):
    """Draws random numbers of all kinds, calls a part twice, and never calls another."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.unused = nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(9, 9)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        noise = random.random() + np.random.random() + torch.rand(())
        return self.linear(self.linear(self.norm(x))), noise


def summarize(model: nn.Module, *shape: int, **options: Any) -> Summary:
    task = SupervisedTask(model, nn.CrossEntropyLoss(), **options)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return summarize_model(task, OneBatch(*shape), trained, None)


def test_summarize_model_counts_shapes_parameters_and_flops() -> None:
    part = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 6 * 6, 5))
    part[0].requires_grad_(False)
    rows = {row.name: row for row in summarize(nn.Sequential(part, nn.ReLU()), 1, 8, 8).rows}
    assert list(rows) == ["(model)", "0", "0.0", "0.1", "0.2", "1"]
    assert [row.depth for row in rows.values()] == [0, 1, 2, 2, 2, 1]
    conv, linear = 2 * 9 * 2 * 36, 2 * 72 * 5
    assert [row.flops for row in rows.values()] == [conv + linear] * 2 + [conv, 0, linear, 0]
    assert [row.parameters for row in rows.values()] == [385, 385, 20, 0, 365, 0]
    assert [row.trainable for row in rows.values()] == [365, 365, 0, 0, 365, 0]
    assert rows["0.0"].output_shape == "[1, 2, 6, 6]"
    assert rows["(model)"].kind == "Sequential"


def test_summarize_model_leaves_no_trace() -> None:
    model = Noisy().train()
    model.linear.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = repr(rng_state())
    summary = summarize(model, 4)
    assert summary.problem is None
    assert repr(rng_state()) == before
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    rows = {row.name: row for row in summary.rows}
    assert rows["linear"].flops == 2 * (2 * 4 * 4), "two calls"
    assert rows["unused"].output_shape == ""
    assert rows["(model)"].output_shape == "[1, 4], []"


def test_summarize_model_attention_counts_its_parts() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    rows = {row.name: row for row in summarize(model, 5, 8).rows}
    assert rows["layers.0.linear1"].flops == 2 * 5 * 8 * 16
    assert torch.backends.mha.get_fastpath_enabled()


def test_summarize_model_compiled_is_not_compiled_for_it() -> None:
    model = nn.Linear(3, 2)
    model.compile(backend=lambda *_: pytest.fail("compiled"))
    assert summarize(model, 3).rows[0].flops == 12


def test_summarize_model_that_cannot_run_says_why() -> None:
    model = nn.Linear(3, 2)
    summary = summarize(model, 7)
    assert (summary.rows[0].parameters, summary.rows[0].flops) == (8, None)
    assert summary.problem is not None
    assert "cannot take" in summary.problem
    assert "one sample cannot pass" in describe(summary, 1)
    own = summarize_model(Task(model), OneBatch(3), {}, None)
    assert own.problem == "NotImplementedError: Task has no predict_step"
    assert model.training


@pytest.mark.parametrize(
    ("optimizer", "bytes_per_value", "extra"),
    [
        (torch.optim.SGD, 0, 0),
        (lambda p: torch.optim.SGD(p, momentum=0.9), 4, 0),
        (torch.optim.AdamW, 8, 4),  # and the step of each parameter
    ],
)
def test_optimizer_state_bytes_are_those_after_a_step(
    optimizer: Any, bytes_per_value: int, extra: int
) -> None:
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), (5,))]
    found = optimizer_state_bytes(optimizer, parameters)
    assert found == bytes_per_value * 22 + extra * 3


def test_optimizer_state_bytes_of_one_that_needs_values_is_unknown() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    assert optimizer_state_bytes(torch.optim.LBFGS, [parameter]) is None


def test_describe_depth_selects_rows() -> None:
    summary = summarize(nn.Sequential(nn.Sequential(nn.Linear(3, 2))), 3)
    assert [len(describe(summary, depth).splitlines()) for depth in (0, 1, 2, -1)] == [2, 4, 5, 5]
    assert "8 parameters, 8 of them trained, 12 FLOPs per sample" in describe(summary, 0)
    assert "state of the optimizer unknown" in describe(summary, 0)
