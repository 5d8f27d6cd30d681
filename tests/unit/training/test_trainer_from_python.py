"""`Trainer` built from Python objects, without a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from app.callbacks.console import Console
from app.callbacks.progress import Progress
from app.data.loaders import make_loader
from app.runtime.errors import StorageError, UserError
from app.training.accumulator import StageResult
from app.training.events import Callback, Callbacks
from app.training.history import History
from app.training.limits import SaveSchedule, TrainingLimits
from app.training.optim.optim_wrapper import OptimWrapper, OptimWrapperDict
from app.training.supervised import SupervisedTask
from app.training.trainer import Trainer
from tests.support.runs import config_issues
from tests.support.training_datasets import DATASETS, StreamDataset, X, Y


def make_trainer(folder: Path, limits: TrainingLimits, **options: Any) -> Trainer:
    torch.manual_seed(0)
    task = SupervisedTask(nn.Linear(3, 2), nn.CrossEntropyLoss())
    task.prepare_training(
        OptimWrapperDict(OptimWrapper(torch.optim.SGD(task.model.parameters(), lr=0.1)))
    )
    return Trainer(task, limits, folder, **options)


def test_trainer_takes_an_optimizer_and_asks_for_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = SupervisedTask(nn.Linear(3, 2), nn.CrossEntropyLoss())
    limits, loader = TrainingLimits(max_epochs=2), make_loader(TensorDataset(X, Y), 20)
    with pytest.raises(UserError, match=r"has no optimizer; pass one: Trainer\(..., optimizer="):
        Trainer(task, limits, tmp_path).fit(loader)
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1)
    Trainer(task, limits, str(tmp_path / "a"), optimizer=optimizer).fit(loader)
    reference = make_trainer(tmp_path / "b", limits)
    reference.fit(loader)
    assert torch.equal(task.model.weight, reference.task.model.weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", DATASETS)
def test_fit_gives_the_same_result_for_every_kind_of_dataset(tmp_path: Path, kind: str) -> None:
    reference = make_trainer(tmp_path / "reference", TrainingLimits(max_epochs=2))
    expected = reference.fit(make_loader(TensorDataset(X, Y), 20))
    callbacks = Callbacks([Console(), Progress()])
    trainer = make_trainer(tmp_path / "run", TrainingLimits(max_epochs=2), callbacks=callbacks)
    loader = make_loader(DATASETS[kind](), 20)
    summary = trainer.fit(loader)
    assert torch.equal(reference.task.model.weight, trainer.task.model.weight)
    times = ["epoch_time", "samples/s"]
    pd.testing.assert_frame_equal(summary.drop(columns=times), expected.drop(columns=times))
    has_unknown_length = kind in ("stream", "stream loader")
    assert loader.num_samples == (None if has_unknown_length else 50)
    assert loader.num_batches == (None if has_unknown_length else 3)


def test_fit_on_stream_sets_epoch_and_stops_at_max_steps(tmp_path: Path) -> None:
    stream = StreamDataset()
    trainer = make_trainer(tmp_path, TrainingLimits(max_epochs=None, max_steps=7))
    summary = trainer.fit(make_loader(stream, 20))
    assert stream.epochs == [1, 2, 3]
    assert summary["total_samples"].tolist() == [50, 50, 20]


def test_predict_returns_tensors_and_evaluate_returns_table(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, TrainingLimits(max_epochs=1))
    outputs = trainer.predict(make_loader(TensorDataset(X, Y), 7))
    torch.testing.assert_close(outputs, trainer.task.model(X))
    assert not outputs.requires_grad
    row = trainer.evaluate(make_loader(TensorDataset(X, Y), 7))
    assert row["stage"].tolist() == ["test"]
    assert row["loss_mean"][0] == pytest.approx(
        nn.functional.cross_entropy(outputs, Y).item(), rel=1e-6
    )


def test_load_best_weights_restores_the_best_epoch(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, TrainingLimits(max_epochs=3))
    summary = trainer.fit(make_loader(TensorDataset(X, Y), 20))
    trainer.task.model.weight.data.zero_()
    best = int(summary["loss_mean"].idxmin()) + 1
    assert trainer.state.load_best_weights() == best
    assert trainer.task.model.weight.abs().sum() > 0


def test_mode_test_with_checkpoint_without_config_is_rejected(tmp_path: Path) -> None:
    make_trainer(tmp_path, TrainingLimits(max_epochs=1)).fit(make_loader(TensorDataset(X, Y), 20))
    (issue,) = config_issues("mode=test", f"ckpt={tmp_path}")
    assert "was saved by a Trainer from Python and has no configuration" in issue


def test_resume_of_earlier_checkpoint_trains_again_in_the_same_process(tmp_path: Path) -> None:
    limits = TrainingLimits(max_epochs=3, save_schedule=SaveSchedule(keep_last=3))
    trainer = make_trainer(tmp_path, limits)
    loader = make_loader(TensorDataset(X, Y), 20)
    trainer.fit(loader)
    weight = trainer.task.model.weight.detach().clone()
    trainer.resume(tmp_path / "checkpoints" / "last-1.safetensors")
    assert trainer.state.epoch == 2
    assert trainer.fit(loader)["epoch"].tolist() == [1, 2, 3]
    assert torch.equal(trainer.task.model.weight, weight)


def test_fit_again_with_more_epochs_continues(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, TrainingLimits(max_epochs=1))
    loader = make_loader(TensorDataset(X, Y), 20)
    trainer.fit(loader)
    trainer.limits = TrainingLimits(max_epochs=3)
    assert trainer.fit(loader)["epoch"].tolist() == [1, 2, 3]


def test_fit_into_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    data = make_loader(TensorDataset(X, Y), 10)
    first = make_trainer(tmp_path / "run", TrainingLimits(max_epochs=1))
    first.fit(data)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    second = make_trainer(tmp_path / "run", TrainingLimits(max_epochs=2))
    with pytest.raises(UserError, match="already contains a run, which is not overwritten"):
        second.fit(data)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    second.resume(tmp_path / "run" / "checkpoints" / "last.safetensors")
    assert list(second.fit(data)["epoch"]) == [1, 2]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "status.json").write_text("{}")
    with pytest.raises(UserError, match="already contains a run, which is not overwritten"):
        make_trainer(tmp_path / "other", TrainingLimits(max_epochs=1)).fit(data)


def test_fit_into_folder_that_disappears_is_a_storage_error(tmp_path: Path) -> None:
    class MoveFolder(Callback):
        def on_stage_end(self, result: StageResult, history: History) -> None:  # noqa: ARG002
            (tmp_path / "run").rename(tmp_path / "moved")

    data = make_loader(TensorDataset(X, Y), 10)
    limits = TrainingLimits(max_epochs=3)
    trainer = make_trainer(tmp_path / "run", limits, callbacks=MoveFolder())
    with pytest.raises(StorageError, match=r"run cannot be written: it was deleted, moved or"):
        trainer.fit(data)
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]


def test_trainer_takes_its_folder_as_text(tmp_path: Path) -> None:
    task = SupervisedTask(nn.Linear(3, 2), nn.CrossEntropyLoss())
    assert Trainer(task, TrainingLimits(1), str(tmp_path / "own")).state.folder == tmp_path / "own"
