"""What changes learning: weights of the loss, averages, freezing, chained schedules, finders."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest

from app.experiment.run import execute
from app.experiment.tuner import diverges
from app.runtime.errors import UserError
from app.training.checkpoint.checkpoint import load_checkpoint
from tests.support.runs import job_for


def details(folder: Path, epoch: int, stage: str = "train") -> pd.DataFrame:
    return pd.read_csv(folder / "epoch_details" / f"epoch{epoch:03d}_{stage}.csv")


def test_a_scheduled_weight_is_a_column_and_is_tested_as_it_was(tmp_path: Path) -> None:
    words = (
        "model=mlp", "debug=limit", "goal.metric=loss", "goal.mode=min",
        "loss.cross_entropy.weight={_target_: app.losses.weights.ScheduledWeight, per: epoch, "
        "function: {_target_: app.losses.weights.LinearSchedule, start: 1.0, end: 3.0, last: 2}}",
    )  # fmt: skip
    execute(job_for(*words), tmp_path / "run")
    assert details(tmp_path / "run", 2)["cross_entropy_weight"].tolist() == [3.0] * 4
    test = pd.read_csv(tmp_path / "run" / "test_summary_table.csv")
    assert test["loss_mean"][0] == pytest.approx(
        test["cross_entropy"][0] * test["epoch"][0] * 2 - test["cross_entropy"][0], rel=1e-6
    )
    execute(job_for("mode=test", f"ckpt={tmp_path / 'run'}"), tmp_path / "test")
    again = pd.read_csv(tmp_path / "test" / "test_summary_table.csv")
    assert again["loss_mean"][0] == test["loss_mean"][0]


def test_all_frozen_is_an_error(tmp_path: Path) -> None:
    job = job_for("model=mlp", "debug=fast", "+freeze.all.parameters='*'")
    with pytest.raises(UserError, match="there is nothing to learn: all parameters are frozen"):
        execute(job, tmp_path)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ("{layers: {_target_: torch.optim.SGD}, lairs: {_target_: torch.optim.SGD}}",
         "'lairs' is no part of the model .*parts: layers"),
        ("{_target_: torch.optim.LBFGS}", "LBFGS measures the loss again"),
    ],
)  # fmt: skip
def test_optimizers_that_do_not_fit_are_named(tmp_path: Path, optimizer: str, message: str) -> None:
    words = (
        "model=mlp",
        "debug=fast",
        "~optimizer",
        f"+optimizer={optimizer}",
        "scheduler=constant",
    )
    with pytest.raises(UserError, match=message):
        execute(job_for(*words), tmp_path)


@pytest.mark.parametrize("scheduler", ["chain", "swa"])
def test_chained_schedules_by_configuration(tmp_path: Path, scheduler: str) -> None:
    words = ("model=mlp", "debug=limit", "trainer.max_epochs=5", f"scheduler={scheduler}")
    average = ("average=swa",) if scheduler == "swa" else ()
    execute(job_for(*words, *average), tmp_path)
    used = [details(tmp_path, epoch)["lr"].iloc[0] for epoch in range(1, 6)]
    expected = {
        "chain": [1e-3, 1e-3, 1e-3, 0.8e-3, 0.64e-3],
        "swa": [1e-3, 0.875e-3, 0.625e-3, 0.625e-3, 0.5e-3],
    }
    assert used == pytest.approx(expected[scheduler])


def test_further_monitors_keep_their_own_best(tmp_path: Path) -> None:
    words = (
        "model=mlp",
        "debug=limit",
        "trainer.max_epochs=3",
        "optimizer.lr=0.01",
        "scheduler=constant",
    )
    monitors = (
        "+checkpoint.monitors.low={metric: loss, mode: min}",
        "+checkpoint.monitors.worst={metric: train/loss, mode: max}",
    )
    execute(job_for(*words, *monitors), tmp_path)
    summary = pd.read_csv(tmp_path / "summary_table.csv")
    valid = summary[summary["stage"] == "valid"].reset_index()
    found = {
        name: load_checkpoint(tmp_path / "checkpoints" / f"best-{name}.pt").epoch
        for name in ("low", "worst")
    }
    train = summary[summary["stage"] == "train"].reset_index()
    assert found == {
        "low": valid["loss_mean"].idxmin() + 1,
        "worst": train["loss_mean"].idxmax() + 1,
    }
    assert found["worst"] == 1


def test_finders_as_commands(tmp_path: Path) -> None:
    execute(job_for("mode=find_lr", "model=mlp", "find.steps=30"), tmp_path / "lr")
    assert len(pd.read_csv(tmp_path / "lr" / "find_lr.csv")) <= 30
    execute(
        job_for("mode=find_batch_size", "model=mlp", "find.batch_size_to=600", "find.batches=2"),
        tmp_path / "size",
    )
    table = pd.read_csv(tmp_path / "size" / "find_batch_size.csv")
    assert table["batch_size"].tolist() == [128, 256, 512]
    assert (table["samples/s"] > 0).all()


@pytest.mark.parametrize("task", ["mixup", "cutmix"])
def test_mixup_and_cutmix_of_torchvision_by_configuration(tmp_path: Path, task: str) -> None:
    execute(job_for("model=cnn", "debug=fast", "~callbacks.plots", f"task={task}"), tmp_path)
    assert "accuracy" in details(tmp_path, 1)


@pytest.mark.parametrize(
    ("bounds", "steps"),
    [
        (("trainer.max_epochs=2", "trainer.max_steps=1000"), 10),
        (("trainer.max_epochs=9", "trainer.max_steps=7"), 7),
        (("trainer.max_epochs=null", "trainer.max_steps=7"), 7),
    ],
)
def test_auto_is_the_length_of_the_run_whichever_bound_comes_first(
    tmp_path: Path, bounds: tuple[str, ...], steps: int
) -> None:
    few = ("model=mlp", "trainer.limit_train_batches=5", "trainer.limit_valid_batches=1")
    words = ("scheduler=cosine", "scheduler.warmup_steps=0", "trainer.limit_test_batches=1")
    execute(job_for(*few, *words, *bounds), tmp_path)
    files = sorted((tmp_path / "epoch_details").glob("*_train.csv"))
    used = pd.concat([pd.read_csv(file) for file in files])["lr"].tolist()
    expected = [0.5e-3 * (1 + math.cos(math.pi * step / steps)) for step in range(steps)]
    assert used == pytest.approx(expected)


def test_an_optimizer_whose_part_is_frozen_waits_for_its_epoch(tmp_path: Path) -> None:
    words = ("experiment=mnist_dcgan", "debug=limit", "data.batch_size=16", "model.width=4")
    job = job_for(*words, "+freeze.g={parameters: generator, until_epoch: 2}", "~callbacks.plots")
    execute(job, tmp_path)
    assert details(tmp_path, 2)["lr_generator"].iloc[0] == 2e-4


def test_finders_of_any_schedule_and_of_losses_below_zero(tmp_path: Path) -> None:
    execute(job_for("mode=find_lr", "model=mlp", "scheduler=onecycle", "find.steps=20"), tmp_path)
    assert not diverges([-1.0, -1.1, -1.0])
    assert diverges([1.0, 0.5, 2.5])
    assert diverges([1.0, math.nan])
