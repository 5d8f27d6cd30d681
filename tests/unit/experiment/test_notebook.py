"""The same parts from Python: a Trainer from objects, and `app.compose`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from app.callbacks.console import Console
from app.callbacks.progress import Progress
from app.data.loaders import load
from app.training.events import Callbacks
from app.training.optim.optim_wrapper import OptimWrapper, OptimWrapperDict
from app.training.plan import TrainingLimits
from app.training.supervised import SupervisedTask
from app.training.trainer import Trainer
from tests.support.runs import mistakes_in

X = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


class Samples(Dataset[tuple[Tensor, Tensor]]):
    """Read one by one."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index], Y[index]


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """Of a length that nobody knows."""

    def __init__(self) -> None:
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(X, Y, strict=True))


class Counted(Stream):
    """Of a length that is known."""

    def __len__(self) -> int:
        return len(X)


def make_trainer(folder: Path, plan: TrainingLimits, **options: Any) -> Trainer:
    torch.manual_seed(0)
    task = SupervisedTask(nn.Linear(3, 2), nn.CrossEntropyLoss())
    task.optimizers = OptimWrapperDict(
        OptimWrapper(torch.optim.SGD(task.model.parameters(), lr=0.1))
    )
    return Trainer(task, plan, folder, **options)


DATASETS = {
    "tensors": lambda: TensorDataset(X, Y),
    "samples": Samples,
    "stream": Stream,
    "counted": Counted,
    "loader": lambda: DataLoader(Samples(), batch_size=20),
    "stream loader": lambda: DataLoader(Stream(), batch_size=20),
}


@pytest.mark.parametrize("kind", DATASETS)
def test_every_kind_of_dataset_trains_alike(tmp_path: Path, kind: str) -> None:
    plain = make_trainer(tmp_path / "plain", TrainingLimits(max_epochs=2))
    expected = plain.fit(load(TensorDataset(X, Y), 20))
    trainer = make_trainer(
        tmp_path / "run", TrainingLimits(max_epochs=2), callbacks=Callbacks([Console(), Progress()])
    )
    batches = load(DATASETS[kind](), 20)
    found = trainer.fit(batches)
    assert torch.equal(plain.task.model.weight, trainer.task.model.weight)
    times = ["epoch_time", "samples/s"]
    pd.testing.assert_frame_equal(found.drop(columns=times), expected.drop(columns=times))
    unknown = kind in ("stream", "stream loader")
    assert batches.num_samples == (None if unknown else 50)
    assert batches.num_batches == (None if unknown else 3)


def test_a_stream_hears_of_the_epoch_and_ends_with_max_steps(tmp_path: Path) -> None:
    stream = Stream()
    trainer = make_trainer(tmp_path, TrainingLimits(max_epochs=None, max_steps=7))
    summary = trainer.fit(load(stream, 20))
    assert stream.epochs == [1, 2, 3]
    assert summary["total_samples"].tolist() == [50, 50, 20]


def test_predictions_and_evaluation_give_tensors_and_tables(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, TrainingLimits(max_epochs=1))
    outputs = trainer.predict(load(TensorDataset(X, Y), 7))
    torch.testing.assert_close(outputs, trainer.task.model(X))
    assert not outputs.requires_grad
    row = trainer.evaluate(load(TensorDataset(X, Y), 7))
    assert row["stage"].tolist() == ["test"]
    assert row["loss_mean"][0] == pytest.approx(
        nn.functional.cross_entropy(outputs, Y).item(), rel=1e-6
    )


def test_the_best_weights_are_put_back(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, TrainingLimits(max_epochs=3))
    summary = trainer.fit(load(TensorDataset(X, Y), 20))
    trainer.task.model.weight.data.zero_()
    best = int(summary["loss_mean"].idxmin()) + 1
    assert trainer.state.load_best_weights() == best
    assert trainer.task.model.weight.abs().sum() > 0


def test_a_checkpoint_of_a_trainer_from_python_says_that_it_has_no_configuration(
    tmp_path: Path,
) -> None:
    make_trainer(tmp_path, TrainingLimits(max_epochs=1)).fit(load(TensorDataset(X, Y), 20))
    (mistake,) = mistakes_in("mode=test", f"ckpt={tmp_path}")
    assert "was saved by a Trainer from Python and has no configuration" in mistake
