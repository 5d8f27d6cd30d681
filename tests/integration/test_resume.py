"""Interrupted runs that are resumed end like uninterrupted ones."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch

from app.experiment.run import execute
from app.runtime.errors import ConfigError, UserError
from app.runtime.signals import TrainingInterrupted
from app.training.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from app.training.checkpoint.store import read_store
from tests.support.interrupted_runs import RunJob, iteration_values, job_runner, samples_per_step
from tests.support.processes import assert_equal_runs, status_of
from tests.support.runs import FEW_BATCHES, job_for, run_app

# Overrides, and the steps at which the run is interrupted; the dry run counts as the first.
SCHEDULES: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "warm-up": (("scheduler.warmup_steps=0.6",), (3, 9)),  # after the first step, in warm-up
    "milestone": (
        ("scheduler=multistep", "scheduler.lr_scheduler.milestones=[2,3]"),
        (7, 12),  # after the last step of an epoch, at a milestone
    ),
    "plateau": (
        ("scheduler=plateau", "scheduler.lr_scheduler.patience=0", "optimizer.lr=1e-5"),
        (9, 12),  # in an epoch, in patience
    ),
    "groups": (
        (
            "optimizer=muon",
            "model.hidden=[6,6]",
            "+optimizer.groups.first={parameters: layers.1, lr_scale: 0.5}",
            "optimizer.decay_norm_and_bias=false",
            "scheduler=wsd",
        ),
        (3, 12),
    ),
}


@pytest.fixture
def run_job(tmp_path: Path) -> Iterator[RunJob]:
    with job_runner(tmp_path) as run_job:
        yield run_job


@pytest.mark.parametrize("name", SCHEDULES)
def test_resume_at_any_step_keeps_lr_schedule(run_job: RunJob, name: str) -> None:
    overrides, steps = SCHEDULES[name]
    expected = run_job("uninterrupted", "none:0:0", *overrides)
    rates = iteration_values(expected, "train", "lr")
    assert len({*rates}) > 1, "the schedule must change the learning rate"
    assert len(samples_per_step(expected)) == 20
    for step in steps:
        folder = run_job(str(step), f"raise:0:{step}", *overrides)
        run_job(str(step), "none:0:0", *overrides)
        assert_equal_runs(expected, folder)
        assert samples_per_step(folder) == samples_per_step(expected)


def test_resume_before_or_after_validation_validates_once(run_job: RunJob) -> None:
    expected = run_job("uninterrupted", "none:0:0")
    for name, fault in (("before", "raise:0:4:valid"), ("after", "raise:0:7")):
        folder = run_job(name, fault)
        state = read_store(folder / "checkpoints" / "last.safetensors")[1]
        epochs = [row["epoch"] for row in _history(state) if row["stage"] == "valid"]
        assert epochs == ([] if name == "before" else [1])
        run_job(name, "none:0:0")
        assert_equal_runs(expected, folder)
        assert samples_per_step(folder) == samples_per_step(expected)
        table = pd.read_csv(folder / "summary_table.csv")
        assert table.groupby(["epoch", "stage"]).size().max() == 1


def _history(state: dict[str, str]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = state["history"]
    return rows


def test_resume_keeps_patience_count_and_best_epoch(run_job: RunJob) -> None:
    overrides = ("optimizer.lr=1e-9", "goal.patience=2", "trainer.max_epochs=9")
    expected = run_job("uninterrupted", "none:0:0", *overrides)
    epochs = pd.read_csv(expected / "valid_summary_table.csv")["epoch"]
    assert len(epochs) < 9, "early stopping must end the run"
    best = _best_epoch(expected)
    assert best < len(epochs)
    for step in (7, 12):
        folder = run_job(str(step), f"raise:0:{step}", *overrides)
        run_job(str(step), "none:0:0", *overrides)
        assert_equal_runs(expected, folder)
        assert _best_epoch(folder) == best


def _best_epoch(folder: Path) -> int:
    epoch: int = read_store(folder / "checkpoints" / "best.safetensors")[1]["epoch"]
    return epoch


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_keeps_random_samples_and_dropout(run_job: RunJob, workers: int) -> None:
    """Samples are random, also in workers, and a callback draws random numbers in between."""
    overrides = (
        f"data.loader.num_workers={workers}",
        "+callbacks.draws._target_=faulty.RandomDrawCallback",
    )
    overrides = (*overrides, "trainer.max_epochs=2", "model.dropout=0.3")
    expected = run_job("uninterrupted", "none:0:0", *overrides)
    folder = run_job("run", "raise:0:9", *overrides)
    run_job("run", "none:0:0", *overrides)
    assert_equal_runs(expected, folder)
    assert samples_per_step(folder) == samples_per_step(expected)


def test_resume_on_other_number_of_ranks_takes_same_samples(run_job: RunJob) -> None:
    expected = run_job("uninterrupted", "none:0:0", "trainer.max_epochs=2")
    folder = run_job("run", "raise:0:5", "trainer.max_epochs=2")
    alone = samples_per_step(folder)
    (folder / "ids0").unlink()
    run_job("run", "none:0:0", "trainer.max_epochs=2", size=2)
    found = [*alone, *samples_per_step(folder, 2)]
    assert [sorted(step.split()) for step in found] == [
        sorted(step.split()) for step in samples_per_step(expected)
    ]
    log = (folder / "logs" / "rank1.log").read_text()
    assert "the number of ranks has changed: saved on 1, resumed on 2" in log
    assert status_of(folder)["status"] == "completed"


def test_resume_of_completed_run_changes_nothing(tmp_path: Path) -> None:
    overrides = (
        "model=mlp",
        "trainer.max_epochs=1",
        "hydra.run.dir=run",
        "resume=auto",
        *FEW_BATCHES,
    )
    overrides = (*overrides, "trainer.limit_test_batches=2")
    assert run_app(tmp_path, *overrides).code == 0
    before = _digests(tmp_path)
    for again in (overrides, ("resume=run",)):
        ran = run_app(tmp_path, *again)
        assert ran.code == 0, ran.err
        assert "is already complete: nothing to resume" in ran.out
    assert _digests(tmp_path) == before
    longer = run_app(tmp_path, "resume=run", "trainer.max_epochs=2")
    assert longer.code == 0, longer.err
    assert pd.read_csv(tmp_path / "run/valid_summary_table.csv")["epoch"].tolist() == [1, 2]
    assert "differs from the saved run: trainer.max_epochs: 1 -> 2" in longer.out


def _digests(folder: Path) -> dict[Path, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_resume_after_last_of_max_steps_ends_like_uninterrupted_run(run_job: RunJob) -> None:
    overrides = ("trainer.max_epochs=null", "trainer.max_steps=8")
    expected = run_job("uninterrupted", "none:0:0", *overrides)
    folder = run_job("run", "raise:0:5:valid", *overrides)
    state = read_store(folder / "checkpoints" / "last.safetensors")[1]["training"]
    assert state["mid_epoch"] is not None
    run_job("run", "none:0:0", *overrides)
    assert_equal_runs(expected, folder)
    assert samples_per_step(folder) == samples_per_step(expected)


@pytest.mark.parametrize("step", [7, 9], ids=["between epochs", "in an epoch"])
def test_resume_keeps_callback_columns(run_job: RunJob, step: int) -> None:
    overrides = ("callbacks.tables.memory=true",)
    folder = run_job("run", f"raise:0:{step}", *overrides)
    run_job("run", "none:0:0", *overrides)
    for epoch in (1, 2, 3, 4):
        table = pd.read_csv(folder / f"epoch_details/epoch00{epoch}_train.csv")
        assert table["memory_mb"].gt(0).all()


def test_resume_after_signal_in_validation_restarts_validation_columns(run_job: RunJob) -> None:
    overrides = ("callbacks.tables.memory=true",)
    with pytest.raises(TrainingInterrupted):
        run_job("run", "SIGTERM:0:3:valid", *overrides)
    folder = run_job("run", "none:0:0", *overrides)
    for stage in ("train", "valid", "test"):
        taken = iteration_values(folder, stage, "memory_mb")
        assert taken
        assert min(taken) > 0


def test_resume_of_diverged_run_requires_changed_configuration(tmp_path: Path) -> None:
    overrides = (
        "model=mlp",
        "optimizer.lr=1e30",
        "trainer.max_epochs=3",
        "resume=auto",
        *FEW_BATCHES,
    )
    overrides = (*overrides, "hydra.run.dir=run", "trainer.limit_test_batches=2")
    diverged = run_app(tmp_path, *overrides)
    assert diverged.code == 65
    last_line = diverged.out.splitlines()[-1]
    assert last_line.startswith("training has diverged: the loss is not finite in train, epoch 1, ")
    assert "; try a lower learning rate (lr=" in last_line
    before = _digests(tmp_path)
    again = run_app(tmp_path, *overrides)
    assert (again.code, _digests(tmp_path)) == (65, before)
    assert "has diverged; to resume it, change something" in again.out
    run_app(tmp_path, "resume=run", "optimizer.lr=0.001", "trainer.max_epochs=2")
    assert pd.read_csv(tmp_path / "run/train_summary_table.csv")["epoch"].tolist() == [1, 2]


def test_resume_within_epoch_with_changed_batches_or_columns_fails(run_job: RunJob) -> None:
    differences = {
        "data.batch_size=4": "data.batch_size: 8 -> 4",
        "+metric/single@metric.train=[f1]": "metric.train.f1: None -> torchmetrics.",
        "~metric.train.accuracy": "metric.train.accuracy: torchmetrics.",
        "trainer.gradient_norm=true": "trainer.gradient_norm: False -> True",
    }
    run_job("run", "raise:0:9")
    for override, difference in differences.items():
        message = rf"^{re.escape(difference)}.*cannot change within an epoch"
        with pytest.raises(UserError, match=message):
            run_job("run", "none:0:0", override)
    run_job("run", "none:0:0")


def test_resume_from_checkpoint_with_wrong_content_fails(run_job: RunJob) -> None:
    """The checksum is right, so the content was written this way."""
    folder = run_job("run", "raise:0:9", "callbacks.tables.memory=true")
    saved = {path: path.read_bytes() for path in (folder / "checkpoints").glob("last*.safetensors")}
    for part in ("nonfinite", "callbacks", "rows", "ranks"):
        for file, content in saved.items():
            file.write_bytes(content)
            state = load_checkpoint(file)
            assert state.training is not None
            inside = state.training if part in state.training else state.training["mid_epoch"]
            inside[part] = {"Tables-0": 3} if isinstance(inside[part], dict) else [3]
            save_checkpoint(file, state)
        with pytest.raises(UserError, match=r"belongs to other (callbacks|metrics or is damaged)"):
            run_job("run", "none:0:0")


def test_resume_with_additional_callback_column_leaves_earlier_rows_empty(run_job: RunJob) -> None:
    folder = run_job("run", "raise:0:9")
    state = read_store(folder / "checkpoints" / "last.safetensors")[1]["training"]
    done = state["mid_epoch"]["batches"]
    run_job("run", "none:0:0", "callbacks.tables.memory=true")
    table = pd.read_csv(folder / "epoch_details" / f"epoch00{state['batches'] // 5 + 1}_train.csv")
    assert table["memory_mb"].isna().tolist() == [place < done for place in range(len(table))]


def test_resume_of_completed_run_with_more_epochs_ends_like_longer_run(run_job: RunJob) -> None:
    overrides = ("scheduler=constant",)
    expected = run_job("uninterrupted", "none:0:0", *overrides)
    folder = run_job("run", "none:0:0", *overrides, "trainer.max_epochs=2")
    run_job("run", "none:0:0", *overrides)
    assert samples_per_step(folder) == samples_per_step(expected)
    one, other = (torch.load(f / "model.pt", weights_only=True) for f in (expected, folder))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_resume_within_epoch_with_an_optimizer_per_part_ends_like_uninterrupted_run(
    tmp_path: Path,
) -> None:
    gan = ["experiment=mnist_dcgan", "model.width=4", "data.batch_size=16", "trainer.max_epochs=2"]
    gan += [f"trainer.limit_{stage}_batches=3" for stage in ("train", "valid", "test")]
    gan += ["callbacks=none", "metric=none", "goal.metric=loss", "goal.mode=min"]
    gan += ["checkpoint.every_n_steps=1", "checkpoint.keep_last=4"]
    expected, folder = tmp_path / "uninterrupted", tmp_path / "run"
    expected.mkdir()
    execute(job_for(*gan), expected)
    shutil.copytree(expected, folder)
    file = folder / "checkpoints" / "last-2.safetensors"
    training = load_checkpoint(file).training
    assert training is not None
    assert training["mid_epoch"] is not None
    execute(job_for(f"resume={file}", f"hydra.run.dir={folder}"), folder)
    files = (path / "checkpoints" / "last.safetensors" for path in (expected, folder))
    one, other = map(load_checkpoint, files)
    torch.testing.assert_close(other.model, one.model, rtol=0, atol=0)
    assert one.training is not None
    assert other.training is not None
    for part in ("generator", "discriminator"):
        states = [
            t["optimizers"][part]["optimizer"]["state"] for t in (other.training, one.training)
        ]
        torch.testing.assert_close(*states, rtol=0, atol=0)


def test_resume_keeps_status_fields(tmp_path: Path) -> None:
    overrides = (
        "model=mlp",
        "name=mine",
        "tags=[a,b]",
        "notes=why",
        "trainer.max_epochs=1",
        *FEW_BATCHES,
    )
    assert run_app(tmp_path, *overrides, "~callbacks.plots", "hydra.run.dir=run").code == 0
    again = run_app(tmp_path, "resume=run", "trainer.max_epochs=2", "notes=longer")
    assert again.code == 0, again.err
    status = status_of(tmp_path / "run")
    assert [status[key] for key in ("name", "tags", "notes")] == ["mine", ["a", "b"], "longer"]


def test_resume_with_changed_lr_uses_it_and_keeps_momentum(run_job: RunJob) -> None:
    overrides = ("scheduler=multistep", "scheduler.lr_scheduler.milestones=[1,3]")
    folder = run_job("run", "raise:0:13", *overrides, "optimizer.lr=0.01")
    run_job("run", "none:0:0", *overrides, "optimizer.lr=0.02")
    rates = iteration_values(folder, "train", "lr")
    assert rates == pytest.approx([0.01] * 5 + [0.001] * 5 + [0.001] + [0.002] * 4 + [2e-4] * 5)
    state = read_store(folder / "checkpoints" / "last.safetensors")[1]
    assert state["training"]["optimizers"][""]["steps"] == 20
    assert len(state["training"]["optimizers"][""]["optimizer"]["state"]) == 4, (
        "the optimizer state must be kept"
    )


def test_resume_with_changed_lr_within_warmup_scales_remaining_steps(run_job: RunJob) -> None:
    overrides = ("scheduler=constant", "scheduler.warmup_steps=20")
    folder = run_job("run", "raise:0:13", *overrides, "optimizer.lr=0.01")
    run_job("run", "none:0:0", *overrides, "optimizer.lr=0.02")
    before = [0.01 * step / 20 for step in range(1, 12)]
    after = [0.02 * step / 20 for step in range(12, 21)]
    assert iteration_values(folder, "train", "lr") == pytest.approx(before + after)


def test_resume_of_longer_run_stretches_warmup_that_is_a_share(run_job: RunJob) -> None:
    overrides = ("scheduler=constant", "scheduler.warmup_steps=0.9", "optimizer.lr=0.01")
    folder = run_job("run", "raise:0:13", *overrides)
    run_job("run", "none:0:0", *overrides, "trainer.max_epochs=8")
    before = [0.01 * step / 18 for step in range(1, 12)]
    after = [0.01 * min(1.0, step / 36) for step in range(12, 41)]
    assert iteration_values(folder, "train", "lr") == before + after


def test_resume_keeps_tensorboard_steps(run_job: RunJob) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    overrides = ("callbacks/single@callbacks=[tensorboard]", "callbacks.tensorboard.hparams=false")
    folder = run_job("run", "raise:0:9", *overrides)
    run_job("run", "none:0:0", *overrides)
    drawn = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    drawn.Reload()
    assert [point.step for point in drawn.Scalars("train_step/loss")] == list(range(1, 21))
    assert [point.step for point in drawn.Scalars("train/loss_mean")] == [1, 2, 3, 4]


def test_resume_with_other_architecture_fails(run_job: RunJob) -> None:
    cases = {  # overrides -> keys that are refused
        ("model.hidden=[7]", "optimizer=sgd", "data.split.seed=4"): (
            "model.hidden: [128] -> [7]",
            "optimizer._target_",
            "data.split.seed",
        ),
        ("model=lenet",): ("model._target_",),
    }
    run_job("run", "raise:0:3")
    for overrides, keys in cases.items():
        with pytest.raises(ConfigError) as refused:
            run_job("run", "none:0:0", *overrides)
        reason = "cannot be changed; the run was trained with the saved value"
        refusals = [str(issue) for issue in refused.value.issues if reason in str(issue)]
        for key in keys:
            assert any(key in refusal for refusal in refusals), refused.value
