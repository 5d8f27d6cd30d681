"""Schedulers one after the other, and several at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, ExponentialLR, LRScheduler

from app.training.optim.chain import chained, sequential
from tests.support.toy_training import lrs_of


def exponential(gamma: float) -> Callable[[Optimizer], LRScheduler]:
    return lambda optimizer: ExponentialLR(optimizer, gamma)


def constant(factor: float) -> Callable[[Optimizer], LRScheduler]:
    return lambda optimizer: ConstantLR(optimizer, factor, total_iters=2)


def test_sequential_and_chained_schedulers_combine_with_warmup() -> None:
    schedulers = {"a": exponential(1.0), "b": exponential(0.5)}
    one_after_the_other = lambda o: sequential(o, schedulers, [3])  # noqa: E731
    assert lrs_of(one_after_the_other, 6) == [1, 1, 1, 1, 0.5, 0.25]
    assert lrs_of(one_after_the_other, 6, warmup=2) == [0.5, 1, 1, 1, 0.5, 0.25]
    both = lambda o: chained(o, {"a": constant(0.1), "b": exponential(0.5)})  # noqa: E731
    assert lrs_of(both, 4) == pytest.approx([0.1, 0.05, 0.25, 0.125])
    with pytest.raises(ValueError, match="2 schedulers need 1 of them"):
        lrs_of(lambda o: sequential(o, schedulers, [1, 2]), 1)
