"""Points of two classes, and what small tests train on them with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from app.data.loaders import make_loader
from app.training.limits import TrainingLimits
from app.training.optim.optim_wrapper import OptimWrapper, OptimWrapperDict
from app.training.task import Task
from app.training.trainer import Trainer

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


def make_optimizers(model: nn.Module, **options: Any) -> OptimWrapperDict:
    return OptimWrapperDict(OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1), **options))


def fit(
    task: Task, folder: Path, data: Any, epochs: int = 1, batch_size: int = 10, **options: Any
) -> pd.DataFrame:
    trainer = Trainer(task, TrainingLimits(max_epochs=epochs), folder, **options)
    return trainer.fit(make_loader(data, batch_size), make_loader(data, batch_size))


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """A plain function as a metric."""
    return (outputs.argmax(1) == targets).float().mean()
