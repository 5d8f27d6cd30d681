"""Schedules and optimizers of torch: their files, with parameter groups."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.optim import SGD, Optimizer

from app.config.instantiate import Instantiator
from app.config.optimizers import optimizer_arguments, per_group_rates
from app.config.validate import fill_auto
from app.training.optim.lr_schedule import LRSchedule
from app.training.optim.optim_wrapper import OptimWrapper
from app.training.optim.schedules import warmup_stable_decay
from tests.support.toy_training import lrs_of

CONF = Path(__file__).parents[4] / "conf"
STEPS = 20
SCHEDULES = sorted(
    path.stem
    for path in (CONF / "scheduler").glob("*.yaml")
    if path.stem not in ("constant", "none", "lambda", "multiplicative", "plateau")
)
OPTIMIZERS = sorted(path.stem for path in (CONF / "optimizer").glob("*.yaml"))


def two_groups() -> Optimizer:
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in (1.0, 0.25)]
    return SGD(groups, lr=1.0, momentum=0.9)


def make_schedule(option: str) -> LRSchedule:
    """Schedule of a file for two groups, the second of which has a quarter of the rate."""
    values = {"optimizer": {"lr": 1.0}, "goal": {"mode": "max"}}
    loaded = OmegaConf.load(CONF / "scheduler" / f"{option}.yaml")
    config = OmegaConf.merge(values, {"scheduler": loaded})
    node = OmegaConf.to_container(config, resolve=True)["scheduler"]["lr_scheduler"]  # type: ignore[index,call-overload]
    optimizer = two_groups()
    node = per_group_rates(fill_auto(node, STEPS), [1.0, 0.25])
    built = Instantiator()("scheduler.lr_scheduler", node, optimizer)
    return LRSchedule(optimizer, built, warmup_steps=3)


def advance(schedule: LRSchedule, steps: int) -> list[list[float]]:
    rates = []
    for _ in range(steps):
        schedule.optimizer.step()
        schedule.on_step_end()
        rates.append([group["lr"] for group in schedule.groups])
    return rates


@pytest.mark.parametrize("option", SCHEDULES)
def test_every_schedule_keeps_the_ratio_of_groups_and_resumes_exactly(option: str) -> None:
    schedule = make_schedule(option)
    rates = advance(schedule, 7)
    assert len({rate for rate, _ in rates}) > 1
    for rate, scaled in rates:
        assert scaled == pytest.approx(rate / 4, abs=1e-6)
    saved = json.loads(json.dumps(schedule.state_dict(), default=repr))
    resumed = make_schedule(option)
    resumed.optimizer.load_state_dict(copy.deepcopy(schedule.optimizer.state_dict()))
    resumed.load_state_dict(saved)
    assert advance(resumed, 7) == advance(schedule, 7)


def test_torch_schedules_all_have_a_file() -> None:
    texts = " ".join(path.read_text() for path in (CONF / "scheduler").glob("*.yaml"))
    ours = {"SequentialLR": "chain.sequential", "ChainedScheduler": "chain.chained"}
    for name in torch.optim.lr_scheduler.__all__:
        if name != "LRScheduler":
            assert ours.get(name, f"lr_scheduler.{name}") in texts, name


def test_torch_optimizers_all_have_a_file_and_make_a_step() -> None:
    texts = ""
    for option in OPTIMIZERS:
        path = CONF / "optimizer" / f"{option}.yaml"
        texts += path.read_text()
        node: Any = OmegaConf.to_container(OmegaConf.load(path))
        if option in ("adam_gan", "lbfgs", "sparse_adam"):
            continue
        weight = nn.Parameter(torch.ones(2, 2))
        arguments = {k: v for k, v in optimizer_arguments(node).items() if k != "defaults"}
        wrapper = OptimWrapper(Instantiator()("optimizer", arguments, [weight]))
        wrapper.step(weight.square().sum(), 1)
        assert not torch.equal(weight.detach(), torch.ones(2, 2)), option
    for name, target in vars(torch.optim).items():
        if isinstance(target, type) and name != "Optimizer":
            assert f"torch.optim.{name}\n" in texts, name


def test_warmup_stable_decay_is_constant_until_the_rate_falls() -> None:
    rates = lrs_of(lambda o: warmup_stable_decay(o, 10, decay=0.4), 11, warmup=2)
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])
    root = lrs_of(lambda o: warmup_stable_decay(o, 4, 1.0, "sqrt", min_factor=0.5), 6)
    assert root == pytest.approx([1, 0.75, 1 - 0.5 * 0.5**0.5, 1 - 0.5 * 0.75**0.5, 0.5, 0.5])
    with pytest.raises(ValueError, match=r"decay_type='sqr' .* did you mean 'sqrt'"):
        warmup_stable_decay(two_groups(), 10, decay_type="sqr")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="decay=0 must be above 0"):
        warmup_stable_decay(two_groups(), 10, decay=0)
