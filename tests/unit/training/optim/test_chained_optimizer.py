"""Several optimizers that step as one."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Muon, Optimizer, SparseAdam

from app.runtime.nested import map_tensors
from app.training.optim.chained_optimizer import ChainedOptimizer, classes_of_groups
from app.training.optim.lr_schedule import LRSchedule
from app.training.optim.optim_wrapper import OptimWrapper, OptimWrapperDict

X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))


def make_optimizers(model: nn.Sequential) -> list[Optimizer]:
    biases = [{"params": [layer.bias]} for layer in model]
    return [
        AdamW(biases, lr=0.1),
        Muon([model[1].weight], lr=0.1),
        SGD([model[0].weight, model[2].weight], lr=0.1, momentum=0.9),
    ]


def make_wrapper(model: nn.Sequential) -> OptimWrapper:
    optimizer = ChainedOptimizer(make_optimizers(model))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    return OptimWrapper(optimizer, LRSchedule(optimizer, scheduler, warmup_steps=2))


def train(wrapper: OptimWrapper, model: nn.Module, steps: int) -> None:
    for _ in range(steps):
        wrapper.step(model(X).square().mean(), len(X))


def test_chained_optimizer_steps_like_its_members_alone() -> None:
    model, other = make_model(), make_model()
    chained, separate = ChainedOptimizer(make_optimizers(model)), make_optimizers(other)
    for _ in range(3):
        for net, optimizers in ((model, [chained]), (other, separate)):
            net.zero_grad()
            net(X).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    assert classes_of_groups(chained) == ["AdamW", "AdamW", "AdamW", "Muon", "SGD"]


def test_chained_optimizer_resumes_exactly_with_its_schedule() -> None:
    model, again = make_model(), make_model()
    wrapper = make_wrapper(model)
    train(wrapper, model, 3)
    state: dict[str, Any] = map_tensors(torch.clone, copy.deepcopy(wrapper.state_dict()))
    again.load_state_dict(model.state_dict())
    resumed = make_wrapper(again)
    resumed.load_state_dict(state)
    train(wrapper, model, 3)
    train(resumed, again, 3)
    assert wrapper.lrs == resumed.lrs
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_chained_optimizer_trains_sparse_and_dense_parameters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(4, 3, sparse=True), nn.Linear(3, 2))
    before = copy.deepcopy(model.state_dict())
    members = [SparseAdam(model[0].parameters()), AdamW(model[1].parameters())]
    wrapper = OptimWrapper(ChainedOptimizer(members), tracks_grad_norm=True)
    OptimWrapperDict(wrapper)  # checks losses and gradients for NaN
    for _ in range(2):
        wrapper.step(model(torch.tensor([0, 2])).square().mean(), 2)
    rows = (model[0].weight != before["0.weight"]).any(1)
    assert rows.tolist() == [True, False, True, False]
    assert not torch.equal(model[1].weight, before["1.weight"])
