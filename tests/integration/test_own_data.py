"""Training on datasets defined by the user: iterable datasets and dict samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from app.config.instantiate import Instantiator
from app.data.datamodule import make_datasets
from app.data.split import dataset_labels
from app.experiment.factory import make_loss
from app.experiment.run import execute
from app.runtime.errors import UserError
from tests.support.own_data import OWN_DATA, STREAM, write_own_data
from tests.support.runs import job_for
from tests.support.sweeps import sweep_folder, sweep_runner


@pytest.fixture(autouse=True)
def own_data(tmp_cwd: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_own_data(tmp_cwd)
    monkeypatch.syspath_prepend(tmp_cwd)
    return tmp_cwd


def test_iterable_dataset_of_unknown_length_trains(own_data: Path) -> None:
    execute(job_for(*OWN_DATA, *STREAM, "scheduler=constant"), own_data / "run")
    summary = pd.read_csv(own_data / "run" / "train_summary_table.csv")
    assert summary["total_samples"].tolist() == [100, 100]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), "'auto' is the length of the run, which is unknown"),
        (("scheduler=constant", "scheduler.warmup_steps=0.1"),
         r"scheduler.warmup_steps=0.1 is a share of the run's steps, whose number is unknown"),
        (("scheduler=constant", "trainer.limit_train_batches=0.5"), "a fraction of an iterable"),
        (("scheduler=constant", "trainer.overfit_batches=2"), "needs data that is not iterable"),
        (("scheduler=constant", "data.source.valid=null", "data.split.valid=0.1"),
         "an iterable dataset cannot be split"),
        (("scheduler=constant", "data.sampling={_target_: app.data.sampling.BalancedClasses}"),
         "data.sampling needs"),
    ],
)  # fmt: skip
def test_iterable_dataset_with_unsupported_option_is_refused(
    own_data: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        execute(job_for(*OWN_DATA, *STREAM, *overrides), own_data / "run")
    assert not (own_data / "run" / "epoch_details").exists()


def test_dict_samples_train_and_unknown_keys_are_named(own_data: Path) -> None:
    overrides = ["data.inputs=x", "data.targets=y", "optimizer.lr=0.05", "trainer.max_epochs=3"]
    overrides += [f"data.source.{stage}._target_=own_data.Dicts" for stage in ("train", "valid")]
    assert (execute(job_for(*OWN_DATA, *overrides), own_data / "run") or 0) > 0.7
    with pytest.raises(
        UserError, match=r"data\.inputs, data\.targets: .*there is no 'z'; available: x, y"
    ):
        execute(job_for(*OWN_DATA, *overrides, "data.targets=z"), own_data / "other")


def write_table(path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 2, generator=generator)
    table = pd.DataFrame(x.numpy(), columns=["a", "b"])
    table["label"] = ["rare" if value > 0.8 else "common" for value in table["a"]]
    table["patient"] = [index // 3 for index in range(60)]
    table.to_csv(path, index=False)


def test_class_weights_of_the_training_part_are_saved_and_used(own_data: Path) -> None:
    write_table(own_data / "table.csv")
    table = ("data=csv", "data.path=table.csv", "model=mlp", "model.hidden=[4]")
    job = job_for(*table, "data.class_weights=auto", "trainer.max_epochs=1")
    labels = dataset_labels(make_datasets(job.config, Instantiator())["train"], 1)
    assert labels is not None
    counts = torch.bincount(labels)
    expected = (counts.sum() / (2 * counts)).tolist()
    assert job.saved["data"]["class_weights"] == pytest.approx(expected, rel=1e-5)
    function: Any = make_loss(job.config, Instantiator()).terms["cross_entropy"].function
    assert function.weight.tolist() == pytest.approx(expected, rel=1e-5)
    execute(job, own_data / "run")
    tested = job_for("mode=test", f"ckpt={own_data / 'run'}")
    assert tested.plain["data"]["class_weights"] == job.saved["data"]["class_weights"]


def test_cross_validation_is_a_sweep_with_means_over_the_folds(
    own_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_table(own_data / "table.csv")
    run = sweep_runner(own_data, monkeypatch)
    run(
        "data=csv", "data.path=table.csv", "data.source.train.group=patient", "model=mlp",
        "data.folds=3", "data.fold=range(3)", "optimizer.lr=0.1,0.01", "trainer.max_epochs=1",
    )  # fmt: skip
    folder = sweep_folder(own_data)
    table, means = (pd.read_csv(folder / f"{n}.csv") for n in ("sweep", "sweep_by_config"))
    assert table["data.fold"].tolist() == [0, 0, 1, 1, 2, 2]
    assert means["completed"].tolist() == [3, 3]
    for rate, mean, std in zip(
        means["optimizer.lr"], means["best_accuracy_mean"], means["best_accuracy_std"], strict=True
    ):
        values = table[table["optimizer.lr"] == rate]["best_accuracy"]
        assert (mean, std) == (pytest.approx(values.mean()), pytest.approx(values.std()))
