"""Training by configuration: loss weights, freezing, optimizers, schedules, monitors, tuners."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest

from app.experiment.run import execute
from app.experiment.tuner import has_diverged
from app.runtime.errors import UserError
from app.training.checkpoint.checkpoint import load_checkpoint
from tests.support.runs import job_for


def epoch_details(folder: Path, epoch: int, stage: str = "train") -> pd.DataFrame:
    return pd.read_csv(folder / "epoch_details" / f"epoch{epoch:03d}_{stage}.csv")


def test_scheduled_weight_is_a_column_and_is_restored_for_testing(tmp_path: Path) -> None:
    overrides = (
        "model=mlp", "debug=limit", "goal.metric=loss", "goal.mode=min", "~callbacks.plots",
        "loss.cross_entropy.weight={_target_: app.losses.weights.ScheduledWeight, per: epoch, "
        "function: {_target_: app.losses.weights.LinearSchedule, start: 1.0, end: 3.0, last: 2}}",
    )  # fmt: skip
    execute(job_for(*overrides), tmp_path / "run")
    assert epoch_details(tmp_path / "run", 2)["cross_entropy_weight"].tolist() == [3.0] * 4
    test = pd.read_csv(tmp_path / "run" / "test_summary_table.csv")
    assert test["loss_mean"][0] == pytest.approx(
        test["cross_entropy"][0] * test["epoch"][0] * 2 - test["cross_entropy"][0], rel=1e-6
    )
    execute(job_for("mode=test", f"ckpt={tmp_path / 'run'}"), tmp_path / "test")
    again = pd.read_csv(tmp_path / "test" / "test_summary_table.csv")
    assert again["loss_mean"][0] == test["loss_mean"][0]


def test_freezing_all_parameters_is_rejected(tmp_path: Path) -> None:
    job = job_for("model=mlp", "debug=fast", "+freeze.all.parameters='*'")
    with pytest.raises(UserError, match="nothing to train: all parameters are frozen"):
        execute(job, tmp_path)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ("{layers: {_target_: torch.optim.SGD}, lairs: {_target_: torch.optim.SGD}}",
         "'lairs' is not a trainable part of the model; allowed: layers"),
        ("{_target_: torch.optim.LBFGS}", "LBFGS needs a closure that evaluates the loss again"),
    ],
)  # fmt: skip
def test_optimizer_that_does_not_fit_the_model_is_rejected(
    tmp_path: Path, optimizer: str, message: str
) -> None:
    overrides = (
        "model=mlp",
        "debug=fast",
        "~optimizer",
        f"+optimizer={optimizer}",
        "scheduler=constant",
    )
    with pytest.raises(UserError, match=message):
        execute(job_for(*overrides), tmp_path)


@pytest.mark.parametrize("scheduler", ["chain", "swa"])
def test_chained_schedule_sets_the_learning_rates(tmp_path: Path, scheduler: str) -> None:
    overrides = ("model=mlp", "debug=limit", "trainer.max_epochs=5", "~callbacks.plots")
    average = ("average=swa",) if scheduler == "swa" else ()
    execute(job_for(*overrides, f"scheduler={scheduler}", *average), tmp_path)
    lrs = [epoch_details(tmp_path, epoch)["lr"].iloc[0] for epoch in range(1, 6)]
    expected = {
        "chain": [1e-3, 1e-3, 1e-3, 0.8e-3, 0.64e-3],
        "swa": [1e-3, 0.875e-3, 0.625e-3, 0.5e-3, 0.5e-3],
    }
    assert lrs == pytest.approx(expected[scheduler])


def test_monitors_save_their_own_best_checkpoints(tmp_path: Path) -> None:
    overrides = (
        "model=mlp",
        "debug=limit",
        "trainer.max_epochs=3",
        "optimizer.lr=0.01",
        "scheduler=constant",
        "~callbacks.plots",
    )
    monitors = (
        "+checkpoint.monitors.low={metric: loss, mode: min}",
        "+checkpoint.monitors.worst={metric: train/loss, mode: max}",
    )
    execute(job_for(*overrides, *monitors), tmp_path)
    summary = pd.read_csv(tmp_path / "summary_table.csv")
    valid = summary[summary["stage"] == "valid"].reset_index()
    epochs = {
        name: load_checkpoint(tmp_path / "checkpoints" / f"best-{name}.safetensors").epoch
        for name in ("low", "worst")
    }
    train = summary[summary["stage"] == "train"].reset_index()
    assert epochs == {
        "low": valid["loss_mean"].idxmin() + 1,
        "worst": train["loss_mean"].idxmax() + 1,
    }
    assert epochs["worst"] == 1


def test_find_lr_and_find_batch_size_write_their_tables(tmp_path: Path) -> None:
    execute(job_for("mode=find_lr", "model=mlp", "find.steps=30"), tmp_path / "lr")
    assert len(pd.read_csv(tmp_path / "lr" / "find_lr.csv")) <= 30
    execute(
        job_for("mode=find_batch_size", "model=mlp", "find.batch_size_to=600", "find.batches=2"),
        tmp_path / "size",
    )
    table = pd.read_csv(tmp_path / "size" / "find_batch_size.csv")
    assert table["batch_size"].tolist() == [128, 256, 512]
    assert (table["samples/s"] > 0).all()


@pytest.mark.parametrize("task", ["mixup", "cutmix", "mixup_cutmix"])
def test_task_mixup_and_cutmix_train(tmp_path: Path, task: str) -> None:
    execute(job_for("model=cnn", "debug=fast", "~callbacks.plots", f"task={task}"), tmp_path)
    assert "accuracy" in epoch_details(tmp_path, 1)


@pytest.mark.parametrize(
    ("bounds", "steps"),
    [
        (("trainer.max_epochs=2", "trainer.max_steps=1000"), 10),
        (("trainer.max_epochs=9", "trainer.max_steps=7"), 7),
        (("trainer.max_epochs=null", "trainer.max_steps=7"), 7),
    ],
)
def test_schedule_length_auto_is_the_smaller_of_max_epochs_and_max_steps(
    tmp_path: Path, bounds: tuple[str, ...], steps: int
) -> None:
    few = ("model=mlp", "trainer.limit_train_batches=5", "trainer.limit_valid_batches=1")
    few = (*few, "~callbacks.plots")
    overrides = ("scheduler=cosine", "scheduler.warmup_steps=0", "trainer.limit_test_batches=1")
    execute(job_for(*few, *overrides, *bounds), tmp_path)
    files = sorted((tmp_path / "epoch_details").glob("*_train.csv"))
    lrs = pd.concat([pd.read_csv(file) for file in files])["lr"].tolist()
    expected = [0.5e-3 * (1 + math.cos(math.pi * step / steps)) for step in range(steps)]
    assert lrs == pytest.approx(expected)


def test_optimizer_of_a_frozen_submodule_starts_once_it_is_unfrozen(tmp_path: Path) -> None:
    overrides = ("experiment=mnist_dcgan", "debug=limit", "data.batch_size=16", "model.width=4")
    job = job_for(
        *overrides, "+freeze.g={parameters: generator, until_epoch: 2}", "~callbacks.plots"
    )
    execute(job, tmp_path)
    assert epoch_details(tmp_path, 2)["lr_generator"].iloc[0] == 2e-4


def test_find_lr_supports_any_schedule_and_negative_losses(tmp_path: Path) -> None:
    execute(job_for("mode=find_lr", "model=mlp", "scheduler=onecycle", "find.steps=20"), tmp_path)
    assert not has_diverged([-1.0, -1.1, -1.0])
    assert has_diverged([1.0, 0.5, 2.5])
    assert has_diverged([1.0, math.nan])
