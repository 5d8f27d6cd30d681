"""A tiny classification problem, and trainers and schedules for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.utils.data import TensorDataset

from app.training.limits import TrainingLimits
from app.training.optim.lr_schedule import LRSchedule
from app.training.optim.optim_wrapper import OptimWrapper, OptimWrapperDict
from app.training.supervised import SupervisedTask
from app.training.trainer import Trainer

X = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
DATA = TensorDataset(X, Y)


def make_mlp(batchnorm: bool = False) -> nn.Sequential:
    """Classifier of `X` with the same weights each time."""
    torch.manual_seed(0)
    norm: list[nn.Module] = [nn.BatchNorm1d(5)] if batchnorm else []
    return nn.Sequential(nn.Linear(3, 5), *norm, nn.ReLU(), nn.Linear(5, 2))


def make_trainer(
    folder: Path,
    model: nn.Module,
    epochs: int = 3,
    loss: Any = None,
    tracks_grad_norm: bool = False,
    **options: Any,
) -> Trainer:
    """Trainer of a model by SGD; `options` are those of `Trainer`."""
    task = SupervisedTask(model, loss or nn.CrossEntropyLoss())
    optimizer = SGD(list(task.parameters().values()), lr=0.1)
    wrapper = OptimWrapper(optimizer, tracks_grad_norm=tracks_grad_norm)
    task.prepare_training(OptimWrapperDict(wrapper))
    return Trainer(task, TrainingLimits(max_epochs=epochs), folder, **options)


def lrs_of(
    make_scheduler: Callable[[Optimizer], Any],
    steps: int,
    warmup: int = 0,
    per_epoch: bool = False,
) -> list[float]:
    """Return the learning rates of the first steps, in epochs of two steps, from a rate of 1."""
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = LRSchedule(optimizer, make_scheduler(optimizer), per_epoch, warmup)
    lrs = []
    for step in range(1, steps + 1):
        lrs.append(schedule.lr)
        optimizer.step()
        schedule.on_step_end()
        if step % 2 == 0:
            schedule.on_epoch_end(0.5)
    return lrs
