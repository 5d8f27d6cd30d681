"""The first difference of two runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from app.callbacks.tables import Tables
from app.data.loaders import make_loader
from app.experiment.comparison import compare_tables, compare_weights
from app.runtime.errors import UserError
from app.training.events import Callback, StageStart
from tests.support.toy_training import DATA, make_mlp, make_trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    return train(tmp_path_factory.mktemp("runs") / "first")


def train(folder: Path, epochs: int = 2, callbacks: Callback | None = None) -> Path:
    trainer = make_trainer(folder, make_mlp(), epochs, callbacks=callbacks or Tables(folder))
    trainer.fit(make_loader(DATA, 32), make_loader(DATA, 32))
    return folder


@pytest.fixture
def other(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "other"))


def test_compare_run_trained_again_is_equal(trained: Path, tmp_path: Path) -> None:
    again = train(tmp_path / "again")
    assert compare_tables(trained, again) == (7, None)
    assert compare_weights(trained, again) == (8, None)


def change_cell(path: Path, row: int, column: str, value: str) -> None:
    lines = [line.split(",") for line in path.read_text().splitlines()]
    lines[row][lines[0].index(column)] = value
    path.write_text("\n".join(map(",".join, lines)) + "\n")


def test_compare_tables_names_the_first_changed_cell(trained: Path, other: Path) -> None:
    change_cell(other / "valid_summary_table.csv", 1, "loss_mean", "7.5")
    change_cell(other / "epoch_details" / "epoch002_train.csv", 2, "loss", "8.5")
    change_cell(other / "epoch_details" / "epoch001_valid.csv", 2, "loss", "9.5")
    for name in ("epoch001_valid.csv", "epoch002_train.csv"):
        _, difference = compare_tables(trained, other)
        assert difference is not None
        assert difference.where == f"epoch_details/{name}, row 2, column loss"
        assert difference.values[1] in ("8.5", "9.5")
        shutil.copy(trained / "epoch_details" / name, other / "epoch_details" / name)
    _, difference = compare_tables(trained, other)
    assert difference is not None
    assert difference.where == "valid_summary_table.csv, row 1, column loss_mean"


@pytest.mark.parametrize("column", ["iter_time"])
def test_compare_tables_times_do_not_matter(trained: Path, other: Path, column: str) -> None:
    change_cell(other / "epoch_details" / "epoch001_train.csv", 1, column, "99")
    assert compare_tables(trained, other)[1] is None


def test_compare_tables_missing_file_row_or_column(trained: Path, other: Path) -> None:
    file = other / "epoch_details" / "epoch001_train.csv"
    text = file.read_text()
    file.write_text(text + text.splitlines()[-1] + "\n")
    _, difference = compare_tables(trained, other)
    assert difference is not None
    assert difference.where == "epoch_details/epoch001_train.csv, row 3, column epoch"
    assert difference.values == ("nothing", "1")
    file.write_text(text.replace("loss", "cost"))
    _, difference = compare_tables(trained, other)
    assert difference is not None
    assert "header" in difference.where
    file.unlink()
    _, difference = compare_tables(trained, other)
    assert difference is not None
    assert difference.values == ("a file", "nothing")


def test_compare_tables_refuses_a_link_and_an_endless_line(trained: Path, other: Path) -> None:
    file = other / "epoch_details" / "epoch001_train.csv"
    file.write_bytes(b"x" * 2**21)
    with pytest.raises(UserError, match="a line has over"):
        compare_tables(trained, other)
    file.unlink()
    file.symlink_to(trained / "epoch_details" / "epoch001_train.csv")
    with pytest.raises(UserError, match="is a symbolic link"):
        compare_tables(trained, other)


def test_compare_weights_names_the_first_changed_value(trained: Path, tmp_path: Path) -> None:
    class Disturb(Callback):
        """Changes one weight after the last step."""

        def on_stage_start(self, start: StageStart) -> None:
            if (start.stage, start.epoch) == ("valid", 2):
                with torch.no_grad():
                    model[2].weight[1, 3] += 1

    folder, model = tmp_path / "other", make_mlp()
    trainer = make_trainer(folder, model, 2, callbacks=Disturb())
    trainer.fit(make_loader(DATA, 32), make_loader(DATA, 32))
    _, difference = compare_weights(trained, folder)
    assert difference is not None
    assert difference.where == "checkpoints/last.safetensors, 2.weight[1, 3]"
    assert "(1 of 10 values differ)" in difference.values[1]


def test_compare_weights_of_another_model_names_the_shapes(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    trainer = make_trainer(folder, make_mlp(batchnorm=True), 2)
    trainer.fit(make_loader(DATA, 32), make_loader(DATA, 32))
    _, difference = compare_weights(trained, folder)
    assert difference is not None
    assert difference.where == "checkpoints/last.safetensors, 2.weight"
    assert difference.values == ("torch.float32 [2, 5]", "nothing")
