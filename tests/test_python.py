"""The same parts from Python: a Trainer from objects, and `app.compose`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import Ran, mistakes_in
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import app
from app.callbacks.console import Console
from app.callbacks.progress import Progress
from app.data.loaders import load
from app.runtime.errors import ConfigError, UserError
from app.training.events import Callbacks
from app.training.optim.optim_wrapper import OptimWrapper, OptimWrapperDict
from app.training.plan import TrainingLimits
from app.training.supervised import SupervisedTask
from app.training.trainer import Trainer

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


def test_composing_gives_the_objects_of_a_command_line(trained: Ran, tmp_path: Path) -> None:
    words = ["model=mlp", "trainer.max_epochs=2", "trainer.limit_train_batches=6"]
    words += ["trainer.limit_valid_batches=3", "data.batch_size=50"]
    with app.compose(words, str(tmp_path)) as experiment:
        summary = experiment.fit()
        tested = experiment.evaluate()
        predicted = experiment.predict()
    times = ["epoch_time", "samples/s"]
    whole = pd.read_csv(trained.folder / "summary_table.csv")
    expected = whole[whole["stage"] != "test"].dropna(axis=1, how="all").drop(columns=times)
    found = summary.drop(columns=times)
    pd.testing.assert_frame_equal(found[expected.columns], expected.reset_index(drop=True))
    accuracy = whole[whole["stage"] == "test"]["accuracy"].iloc[0]
    assert tested["accuracy"][0] == accuracy
    assert len(predicted) == 10_000
    assert experiment.config.trainer.max_epochs == 2
    for name in ("config.yaml", "status.json", "test_summary_table.csv", "plots/loss.png"):
        assert (tmp_path / name).is_file(), name
    assert '"status": "completed"' in (tmp_path / "status.json").read_text()


def test_composing_with_mistakes_names_them_all(elsewhere: Path) -> None:
    with pytest.raises(ConfigError, match="2 mistakes in the configuration"):
        app.compose(["model=mlpp", "trainer.max_epochs=0"])
    with pytest.raises(UserError, match="a sweep belongs on the command line"):
        app.compose(["-m", "seed=0,1"])
    assert list(elsewhere.iterdir()) == []


def test_a_checkpoint_of_a_trainer_from_python_says_that_it_has_no_configuration(
    tmp_path: Path,
) -> None:
    make_trainer(tmp_path, TrainingLimits(max_epochs=1)).fit(load(TensorDataset(X, Y), 20))
    (mistake,) = mistakes_in("mode=test", f"ckpt={tmp_path}")
    assert "was saved by a Trainer from Python and has no configuration" in mistake


def test_the_example_runs(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "examples" / "from_python.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mnist" / "model.pt").is_file()
    spirals = pd.read_csv(tmp_path / "spirals" / "test_summary_table.csv")
    assert spirals["accuracy"][0] > 0.9


def test_a_folder_of_a_run_is_not_composed_into_again(trained: Ran) -> None:
    with pytest.raises(UserError, match="holds a run; it is not overwritten"):
        app.compose(["model=mlp"], str(trained.folder))
    with pytest.raises(UserError, match="mode='check' is for the command line"):
        app.compose(["mode=check"])


def test_several_devices_are_for_the_command_line(elsewhere: Path) -> None:
    with pytest.raises(UserError, match=r"trainer.devices=2: several devices are for the command"):
        app.compose(["model=mlp", "trainer.devices=2"])
    assert not list(elsewhere.iterdir())


@pytest.mark.usefixtures("elsewhere")
def test_a_run_that_was_cut_goes_on_from_python() -> None:
    short = ["trainer.limit_train_batches=3", "trainer.limit_valid_batches=1"]
    words = ["model=mlp", "trainer.max_epochs=1", "scheduler=constant", *short]
    with app.compose(words, folder="run") as first:
        first.fit()
    going_on = ["resume=run", "trainer.max_epochs=2"]
    with app.compose(going_on, folder="run") as second:
        summary = second.fit()
    assert list(summary["epoch"]) == [1, 1, 2, 2]
