"""Use the components without the command line: python examples/from_python.py [FOLDER]."""

import logging
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import app
from app.callbacks.console import Console
from app.callbacks.tables import Tables
from app.config.schema import GoalConfig
from app.data.loaders import make_loader
from app.training.events import Callbacks
from app.training.limits import TrainingLimits
from app.training.optim.optim_wrapper import OptimWrapper, OptimWrapperDict
from app.training.supervised import SupervisedTask
from app.training.trainer import Trainer

logging.basicConfig(level=logging.INFO, format="%(message)s")
folder = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/from_python")


def spirals(count: int, seed: int) -> TensorDataset:
    """Return points on two spirals, labeled by their spiral."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=generator)
    radius = torch.rand(count, generator=generator) * 6
    angle = radius + labels * torch.pi
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1) / 6
    return TensorDataset(points, labels)


# 1. From objects: a model, a loss, metrics and an optimizer.
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
task = SupervisedTask(
    model,
    loss=nn.CrossEntropyLoss(),
    metrics={
        stage: {"accuracy": MulticlassAccuracy(2, average="micro")} for stage in ("valid", "test")
    },
)
task.prepare_training(OptimWrapperDict(OptimWrapper(torch.optim.Adam(model.parameters(), lr=0.01))))
trainer = Trainer(
    task,
    TrainingLimits(max_epochs=20),
    folder / "spirals",
    goal=GoalConfig("accuracy", "max", patience=5),
    callbacks=Callbacks([Tables(folder / "spirals"), Console()]),
)
summary = trainer.fit(
    make_loader(spirals(2000, seed=0), batch_size=50, shuffle=True),
    make_loader(spirals(500, seed=1), 100),
)
print(summary.tail(2))
trainer.state.load_best_weights()
print(trainer.evaluate(make_loader(spirals(500, seed=2), 100)))
print(trainer.predict(make_loader(spirals(4, seed=3), 4)).argmax(1))

# 2. From command-line overrides: the same components, built from the configuration.
with app.compose(
    ["model=mlp", "trainer.max_epochs=1", "trainer.limit_train_batches=50"], str(folder / "mnist")
) as experiment:
    print(experiment.fit())
    print(experiment.evaluate("test"))
    print(experiment.predict("test").head())
