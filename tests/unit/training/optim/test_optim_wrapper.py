"""Optimizer steps: accumulation, clipping, gradient norms and gradient scaling."""

from __future__ import annotations

import copy
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from app.data.loaders import make_loader
from app.runtime.nested import map_tensors
from app.training.optim.finite_check import FiniteCheck, NonFiniteAction
from app.training.optim.lr_schedule import LRSchedule
from app.training.optim.optim_wrapper import OptimWrapper, OptimWrapperDict
from tests.support.toy_training import DATA, X, Y, make_mlp, make_trainer


def make_wrapper(model: nn.Module, **options: Any) -> OptimWrapper:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = LRSchedule(optimizer, None, per_epoch=False, warmup_steps=0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return OptimWrapper(optimizer, schedule, scaler, batch_size=4, **options)


def train_on_batches(sizes: list[int], **options: Any) -> tuple[nn.Linear, Tensor, Tensor]:
    """Train a linear layer on batches of these sizes; return it, the inputs and the targets."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x, y = torch.rand(sum(sizes), 3).double(), torch.randint(0, 2, (sum(sizes),))
    wrapper = make_wrapper(model, **options)
    for a, b in zip(x.split(sizes), y.split(sizes), strict=True):
        wrapper.step(F.cross_entropy(model(a), b), len(b))
    wrapper.flush()
    return model, x, y


@pytest.mark.parametrize("sizes", [[4, 4, 4], [4, 4, 1], [4, 2]])
def test_accumulated_batches_are_equal_to_one_batch_of_all_samples(sizes: list[int]) -> None:
    accumulated, _, _ = train_on_batches(sizes, accumulate=3)
    single, _, _ = train_on_batches([sum(sizes)])
    torch.testing.assert_close(accumulated.weight, single.weight)  # float64, other order of sums


def test_gradients_are_clipped_by_norm_and_by_value() -> None:
    start = nn.Linear(3, 2).double()
    torch.manual_seed(0)
    start = nn.Linear(3, 2).double()
    by_norm, _, _ = train_on_batches([4], clip_norm=1e-3)
    steps = [(a - b) / 0.1 for a, b in zip(start.parameters(), by_norm.parameters(), strict=True)]
    norm = torch.cat([step.flatten() for step in steps]).norm()
    torch.testing.assert_close(norm.item(), 1e-3, rtol=1e-4, atol=0)  # torch adds 1e-6 to the norm
    by_value, _, _ = train_on_batches([4], clip_value=1e-3)
    largest = ((start.weight - by_value.weight) / 0.1).abs().max()
    torch.testing.assert_close(largest.item(), 1e-3)


def test_gradient_norm_is_a_column(tmp_path: Path) -> None:
    model = make_mlp()
    reference = copy.deepcopy(model)
    F.cross_entropy(reference(X), Y).backward()
    gradients = torch.cat([p.grad.flatten() for p in reference.parameters() if p.grad is not None])
    summary = make_trainer(tmp_path, model, 1, tracks_grad_norm=True).fit(make_loader(DATA, 64))
    assert summary["gradient_norm"][0] == pytest.approx(gradients.norm().item(), rel=1e-6)


def test_gradient_norm_with_accumulation_is_empty_between_steps(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, make_mlp(), 1, tracks_grad_norm=True)
    trainer.optimizers.single.accumulate, trainer.optimizers.single.full_batch_size = 2, 32
    norms: list[float] = []
    trainer.callbacks.on_stage_end = lambda result, _: norms.extend(result.steps["gradient_norm"])  # type: ignore[method-assign]
    summary = trainer.fit(make_loader(DATA, 16))
    assert np.isnan(norms[::2]).all()
    assert summary["gradient_norm"][0] == pytest.approx(np.mean(norms[1::2]))


def test_scaler_reduces_its_scale_on_overflow_even_if_gradients_are_zeroed() -> None:
    parameter = nn.Parameter(torch.ones(1))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = torch.optim.SGD([parameter], 0.1)
    wrapper = OptimWrapper(optimizer, scaler=scaler, zero_non_finite=True)
    wrapper.step((parameter * 1e36).sum(), 1)
    assert scaler.get_scale() == 2.0**15
    assert parameter.item() == 1


def test_undo_of_steps_that_the_device_skipped_restores_what_the_schedule_changed() -> None:
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 10)  # also changes the betas
    wrapper = OptimWrapper(optimizer, LRSchedule(optimizer, scheduler, warmup_steps=3))
    wrapper.finite_check = FiniteCheck("stop", torch.device("cuda"))
    for _ in range(3):
        wrapper.step(parameter.sum(), 1)
        wrapper.on_epoch_start()
    wrapper.step(parameter.sum(), 1)
    state, value = copy.deepcopy(wrapper.state_dict()), parameter.item()
    for factor in (math.nan, 1.0):  # all steps after the first bad one are skipped
        wrapper.step((parameter * factor).sum(), 1)
    assert wrapper.state_dict() != state
    wrapper.undo_skipped()
    assert wrapper.state_dict() == state
    assert parameter.item() == value


class OperatorCounter(TorchDispatchMode):
    """Counts the operators that are called on tensors, by name.

    Attributes:
        num_checked: Number of gradients that are checked for NaN and infinity.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.num_checked = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.counts[name] += 1
        if name == "_amp_foreach_non_finite_check_and_unscale_":
            self.num_checked += sum(tensor.ndim > 0 for tensor in args[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("policy", "options", "norms", "checked"),
    [
        (None, {}, 0, 0),
        ("stop", {}, 0, 4),
        ("stop", {"clip_norm": 1.0, "tracks_grad_norm": True}, 1, 0),
        (None, {"clip_norm": 1.0}, 1, 0),
        (None, {"clip_value": 1.0}, 0, 0),
        ("skip", {"zero_non_finite": True}, 0, 0),
    ],
)
def test_gradients_are_read_once_and_only_if_something_asks(
    policy: NonFiniteAction | None, options: dict[str, Any], norms: int, checked: int
) -> None:
    model = make_mlp()
    wrapper = make_wrapper(model, **options)
    OptimWrapperDict(wrapper, policy)
    loss = F.cross_entropy(model(X), Y)
    with OperatorCounter() as operators:
        wrapper.step(loss, len(X))
    assert operators.counts["_foreach_norm"] == norms
    assert operators.num_checked == checked
    assert operators.counts["_local_scalar_dense"] == (policy is not None)


@pytest.mark.parametrize("clip_norm", [None, 1e-3])
def test_checked_and_clipped_steps_are_bitwise_equal_to_a_bare_loop(
    clip_norm: float | None,
) -> None:
    model, bare = make_mlp(), make_mlp()
    wrapper = make_wrapper(model, clip_norm=clip_norm)
    OptimWrapperDict(wrapper, "stop")
    optimizer = torch.optim.SGD(bare.parameters(), lr=0.1)
    for _ in range(3):
        wrapper.step(F.cross_entropy(model(X), Y), len(X))
        optimizer.zero_grad()
        F.cross_entropy(bare(X), Y).backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(bare.parameters(), clip_norm)
        optimizer.step()
    for parameter, other in zip(model.parameters(), bare.parameters(), strict=True):
        assert torch.equal(parameter, other)


def test_cached_parameters_follow_new_groups_and_freezing() -> None:
    first, second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    wrapper = OptimWrapper(torch.optim.SGD([first], lr=1.0), clip_norm=1e-3)
    wrapper.step(first.sum(), 1)
    wrapper.optimizer.add_param_group({"params": [second]})
    wrapper.step((3 * first + 4 * second).sum(), 1)
    steps = 1 - first.item() - 1e-3, 1 - second.item()
    assert steps == pytest.approx((0.6e-3, 0.8e-3), rel=1e-3)  # both are clipped together
    first.requires_grad_(False)
    before = first.item()
    wrapper.step((first + second).sum(), 1)
    assert first.item() == before
    assert 1 - second.item() == pytest.approx(1.8e-3, rel=1e-3)
    second.requires_grad_(False)
    wrapper.step((first + second).sum(), 1)  # nothing to train, and no error
    second.requires_grad_(True)
    wrapper.step((first + second).sum(), 1)
    assert 1 - second.item() == pytest.approx(2.8e-3, rel=1e-3)


def test_loaded_state_has_the_memory_format_of_the_parameters() -> None:
    """Fused optimizers on CUDA refuse state whose strides differ from those of the parameters."""
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    wrapper = OptimWrapper(torch.optim.AdamW(model.parameters()))
    wrapper.step(model(torch.rand(2, 3, 8, 8)).mean(), 2)
    saved = map_tensors(Tensor.contiguous, copy.deepcopy(wrapper.state_dict()))
    wrapper.load_state_dict(saved)
    average = wrapper.optimizer.state[model.weight]["exp_avg"]
    assert average.stride() == model.weight.stride() != average.contiguous().stride()
    assert torch.equal(average, saved["optimizer"]["state"][0]["exp_avg"])


@pytest.mark.parametrize("is_resumed", [False, True])
def test_fused_sgd_trains_parameters_that_get_gradients_later(is_resumed: bool) -> None:
    weights = []
    for fused in (False, True):
        early, late = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
        wrappers = [
            OptimWrapper(torch.optim.SGD([early, late], 0.1, momentum=0.9, fused=fused))
            for _ in range(2)
        ]
        wrappers[0].step((early * 2).sum(), 1)
        if is_resumed:
            state = wrappers[0].state_dict()
            state["optimizer"]["state"].pop(1, None)  # as of a program without these buffers
            wrappers[1].load_state_dict(state)
        for _ in range(2):
            wrappers[is_resumed].step((early * late).sum(), 1)
        weights.append(torch.stack([early, late]).detach())
    torch.testing.assert_close(*weights)
