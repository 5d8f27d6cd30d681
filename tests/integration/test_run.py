"""Complete runs of the program on MNIST: the files they write, and whether these are correct."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from app.data.mnist import mnist
from app.data.split import split_dataset
from tests.support.runs import FEW_BATCHES, RunResult

RUN_FOLDER_FILES = {
    ".hydra",
    ".lock",
    ".owner.json",
    "checkpoints",
    "config.yaml",
    "environment.json",
    "epoch_details",
    "model.pt",
    "model_summary.csv",
    "plots",
    "run.log",
    "status.json",
    "summary_table.csv",
    "test_summary_table.csv",
    "train_batch.png",
    "train_summary_table.csv",
    "valid_batch.png",
    "valid_summary_table.csv",
}


def make_mlp() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))


def load_model(folder: Path) -> nn.Sequential:
    """Load the model of a run with torch alone."""
    state = torch.load(folder / "model.pt", weights_only=True)
    model = make_mlp()
    model.load_state_dict(dict(zip(model.state_dict(), state.values(), strict=True)))
    return model.eval()


# ---- files of a run


def test_run_folder_after_training_has_all_files(trained_run: RunResult) -> None:
    names = {path.name for path in trained_run.folder.iterdir()}
    assert names - {"uncommitted.patch"} == RUN_FOLDER_FILES  # of the checkout of this program
    details = {path.name for path in (trained_run.folder / "epoch_details").iterdir()}
    assert {f"epoch00{n}_{stage}.csv" for n in (1, 2) for stage in ("train", "valid")} < details
    assert len([name for name in details if name.endswith("_test.csv")]) == 1
    assert {path.name for path in (trained_run.folder / "checkpoints").iterdir()} == {
        "best.safetensors",
        "start.json",
        "last.safetensors",
        "last-1.safetensors",
    }


def test_epoch_details_have_one_row_per_iteration(trained_run: RunResult) -> None:
    table = trained_run.csv("epoch_details/epoch002_train.csv")
    expected = "epoch iter stage loss num_samples accuracy total_correct lr data_time iter_time"
    assert list(table.columns) == expected.split()
    assert table["iter"].tolist() == [1, 2, 3, 4, 5, 6]
    assert set(table["stage"]) == {"train"}
    assert (table["iter_time"] > 0).all()


def test_summary_tables_are_sorted_and_agree_with_each_other(trained_run: RunResult) -> None:
    table = trained_run.csv("summary_table.csv")
    stages = list(zip(table["epoch"], table["stage"], strict=True))
    best = int(table[table["stage"] == "test"]["epoch"].iloc[0])
    expected = [(1, "train"), (1, "valid"), (2, "train"), (2, "valid")]
    expected.insert(2 * best, (best, "test"))
    assert stages == expected
    for stage in ("train", "valid", "test"):
        own = trained_run.csv(f"{stage}_summary_table.csv")
        rows = table[table["stage"] == stage].dropna(axis="columns").reset_index(drop=True)
        pd.testing.assert_frame_equal(own, rows, check_dtype=False)
    columns = (
        "epoch stage loss_mean loss_std total_samples accuracy total_correct epoch_time samples/s"
    )
    assert list(trained_run.csv("train_summary_table.csv").columns) == columns.split()


@pytest.mark.parametrize("stage", ["train", "valid"])
def test_summary_row_equals_sums_over_iterations(trained_run: RunResult, stage: str) -> None:
    table = trained_run.csv(f"epoch_details/epoch001_{stage}.csv")
    row = trained_run.csv(f"{stage}_summary_table.csv").iloc[0]
    counts = table["num_samples"].to_numpy()
    assert row["total_samples"] == counts.sum()
    assert row["total_correct"] == table["total_correct"].sum()
    assert row["accuracy"] == row["total_correct"] / row["total_samples"]
    mean = np.average(table["loss"], weights=counts)
    assert row["loss_mean"] == pytest.approx(mean, rel=1e-12)
    std = np.sqrt(np.average((table["loss"] - mean) ** 2, weights=counts))
    assert row["loss_std"] == pytest.approx(std, rel=1e-9)
    assert row["samples/s"] == pytest.approx(counts.sum() / row["epoch_time"])


def test_test_row_equals_independent_recomputation(trained_run: RunResult) -> None:
    images, labels = mnist(train=False).tensors
    with torch.no_grad():
        logits = load_model(trained_run.folder)((images.float() / 255 - 0.1307) / 0.3081)
    row = trained_run.csv("test_summary_table.csv").iloc[0]
    assert row["total_correct"] == (logits.argmax(1) == labels).sum().item()
    assert row["accuracy"] == row["total_correct"] / 10_000
    # float32 sums in a different order
    assert row["loss_mean"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    epoch = int(row["epoch"])
    matrix = trained_run.csv(f"epoch_details/epoch00{epoch}_test_confusion_matrix.csv").to_numpy()
    expected = np.zeros((10, 10), int)
    np.add.at(expected, (labels.numpy(), logits.argmax(1).numpy()), 1)
    assert (matrix == expected).all()


def test_valid_rows_match_the_seeded_split(trained_run: RunResult) -> None:
    valid = split_dataset({"train": mnist(train=True)}, 5000, None, seed=0)["valid"]
    images, labels = (tensor[:150] for tensor in valid.tensors)  # type: ignore[attr-defined]
    with torch.no_grad():
        logits = load_model(trained_run.folder)((images.float() / 255 - 0.1307) / 0.3081)
    table = trained_run.csv("valid_summary_table.csv")
    best = table.loc[table["accuracy"].idxmax()]
    assert best["total_correct"] == (logits.argmax(1) == labels).sum().item()


def test_status_json_after_training_describes_the_run(trained_run: RunResult) -> None:
    status = trained_run.status
    assert status["status"] == "completed"
    assert (status["tags"], status["notes"], status["seed"]) == (["a", "b"], "a note", 0)
    assert status["peak_memory_bytes"] > 100e6
    assert torch.__version__.startswith(status["versions"]["torch"])
    table = trained_run.csv("valid_summary_table.csv")
    assert status["best"]["value"] == table["accuracy"].max()
    assert status["best"]["epoch"] == table["epoch"][table["accuracy"].idxmax()]
    assert status["metrics"]["test"]["total_samples"] == 10_000


def test_log_has_run_header_progress_and_folder(trained_run: RunResult) -> None:
    log = (trained_run.folder / "run.log").read_text()
    for part in (
        "model     app.models.mlp.MLP, 101,770 parameters",
        "train 300 samples in 6 batches; valid 150 samples in 3 batches; test 10,000 samples",
        "goal      max accuracy; early stopping off",
        "notes     [a] [b] a note",
        "expected end",
        "best accuracy",
        f"results are in {trained_run.folder}",
    ):
        assert part in log


def test_plots_are_valid_images(trained_run: RunResult) -> None:
    names = {path.name for path in (trained_run.folder / "plots").iterdir()}
    assert {"loss.png", "accuracy.png", "test_confusion_matrix.png"} < names
    for path in (trained_run.folder / "plots").iterdir():
        with Image.open(path) as image:
            assert image.size[0] > 300


def test_output_without_terminal_has_no_progress_bar(trained_run: RunResult) -> None:
    assert "\r" not in trained_run.out + trained_run.err
    assert "it/s" not in trained_run.err
    assert "loss_mean" in trained_run.out


def test_output_on_terminal_shows_progress_bar(tmp_path: Path) -> None:
    overrides = ("model=mlp", "trainer.max_epochs=1", "data.batch_size=1000", "~callbacks.plots")
    command = [sys.executable, "-m", "app", *overrides]
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    with subprocess.Popen(command, cwd=tmp_path, stdout=child, stderr=child) as process:
        os.close(child)
        output = b""
        while True:
            try:
                chunk = os.read(parent, 65536)
            except OSError:  # the child has closed its end
                break
            if not chunk:
                break
            output += chunk
        assert process.wait() == 0
    os.close(parent)
    text = output.decode()
    assert "epoch 1/1 train:" in text
    assert "samples/s" in text
    assert "55.0k" in text


# ---- evaluating a trained run


def test_mode_test_reproduces_test_results_exactly(
    trained_run: RunResult, app: Callable[..., RunResult]
) -> None:
    time_columns = ["epoch_time", "samples/s"]
    expected = trained_run.csv("test_summary_table.csv").drop(columns=time_columns)
    again = app("mode=test", f"ckpt={trained_run.folder}")
    assert again.code == 0, again.err
    pd.testing.assert_frame_equal(
        again.csv("test_summary_table.csv").drop(columns=time_columns), expected
    )
    assert again.config["model"] == trained_run.config["model"], (
        "must be the saved model, not the default alexnet"
    )
    assert again.folder.name.endswith("_test_mlp_mnist")


def test_mode_valid_reproduces_validation_results(
    trained_run: RunResult, app: Callable[..., RunResult]
) -> None:
    time_columns = ["epoch_time", "samples/s"]
    table = trained_run.csv("valid_summary_table.csv").drop(columns=time_columns)
    file = trained_run.folder / "checkpoints" / "last.safetensors"
    again = app("mode=valid", f"ckpt={file}")
    assert again.code == 0, again.err
    actual = again.csv("valid_summary_table.csv").drop(columns=time_columns)
    pd.testing.assert_frame_equal(actual, table[table["epoch"] == 2].reset_index(drop=True))


def test_mode_test_applies_overrides_on_top_of_saved_config(
    trained_run: RunResult, app: Callable[..., RunResult]
) -> None:
    result = app(
        "mode=test",
        f"ckpt={trained_run.folder}",
        "data.batch_size=32",
        "metric/single@metric.test=[accuracy,auroc]",
    )
    assert result.code == 0, result.err
    assert "differs from the saved run: data.batch_size: 50 -> 32" in result.out
    epoch = result.csv("test_summary_table.csv")["epoch"][0]
    assert len(result.csv(f"epoch_details/epoch00{epoch}_test.csv")) == 313
    before, after = (x.csv("test_summary_table.csv") for x in (trained_run, result))
    assert before["total_correct"][0] / 10_000 == after["accuracy"][0]
    assert 0.5 < after["auroc"][0] <= 1


def test_mode_test_with_other_model_or_split_is_rejected(
    trained_run: RunResult, app: Callable[..., RunResult]
) -> None:
    result = app("mode=test", f"ckpt={trained_run.folder}", "model=lenet", "data.split.seed=1")
    assert result.code == 2
    assert "model._target_: 'app.models.mlp.MLP' -> 'app.models.lenet.LeNet'" in result.err
    assert "data.split.seed: 0 -> 1: cannot be changed" in result.err
    assert not (result.cwd / "outputs").exists()


def test_mode_test_override_reaches_interpolated_values(
    tmp_path: Path, app: Callable[..., RunResult]
) -> None:
    generator = np.random.default_rng(0)
    for name, classes in (("a.npz", 3), ("b.npz", 2)):
        labels = generator.integers(0, classes, 60)
        np.savez(tmp_path / name, x=generator.normal(labels[:, None], 0.1, (60, 4)), y=labels)
    overrides = ("data=npz", "data.num_classes=3", "data.input_shape=[4]", "model=mlp")
    first = app(*overrides, "data.path=a.npz", "trainer.max_epochs=2", "data.batch_size=10")
    assert first.code == 0, first.err
    result = app("mode=test", f"ckpt={first.folder}", "data.path=b.npz")
    assert result.code == 0, result.err
    assert str(tmp_path / "b.npz") in result.out
    # The source is interpolated from data.path, so it must follow the override.
    config = result.folders[-1] / "config.yaml"
    assert f"path: {tmp_path / 'b.npz'}" in config.read_text()


# ---- options


@pytest.mark.parametrize(
    "overrides",
    [
        ("trainer.precision=bf16",),
        ("trainer.precision=fp16", "trainer.gradient_clip_norm=1.0"),
        ("trainer.deterministic=true", "trainer.channels_last=false"),
        ("trainer.compile=true",),
    ],
)
def test_precision_determinism_and_compile_options_train(
    app: Callable[..., RunResult], overrides: tuple[str, ...]
) -> None:
    short = (
        "trainer.max_epochs=1",
        "trainer.limit_test_batches=2",
        "~callbacks.plots",
        *FEW_BATCHES,
    )
    result = app("model=mlp", *short, *overrides)
    assert result.code == 0, result.err + result.out
    assert result.csv("train_summary_table.csv")["loss_mean"][0] < 3
    keys = torch.load(result.folder / "model.pt", weights_only=True).keys()
    assert not any("_orig_mod" in key for key in keys)
    name = overrides[0].partition("precision=")[2] or "fp32"
    assert f"threads), {name}" in result.out
    assert ("first steps compile the model" in result.out) == ("compile" in overrides[0])


def test_precision_bf16_outputs_are_bfloat16(tmp_path: Path, app: Callable[..., RunResult]) -> None:
    (tmp_path / "spy.py").write_text(
        "import pathlib, torch\n"
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self, num_classes):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(784, num_classes))\n"
        "    def forward(self, x):\n"
        "        y = super().forward(x)\n"
        "        pathlib.Path('dtype').write_text(str(y.dtype))\n"
        "        return y\n"
    )
    overrides = ("model=own_file", "model._target_=spy.Net", "trusted_targets=[spy]", "debug=fast")
    assert app(*overrides, "trainer.precision=bf16", "~callbacks.plots").code == 0
    assert (tmp_path / "dtype").read_text() == "torch.bfloat16"


def test_runs_with_same_seed_are_equal_and_with_other_seed_differ(
    app: Callable[..., RunResult],
) -> None:
    for seed in (0, 0, 1):
        result = app("model=cnn", "debug=fast", "~callbacks.plots", f"seed={seed}")
        assert result.code == 0, result.err
    first, second, third = (
        torch.load(folder / "model.pt", weights_only=True) for folder in result.folders
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["classifier.weight"], third["classifier.weight"])


def test_fast_dev_run_trains_one_epoch_of_one_batch(app: Callable[..., RunResult]) -> None:
    result = app(
        "model=alexnet", "trainer.fast_dev_run=true", "data.batch_size=8", "~callbacks.plots"
    )
    assert result.code == 0, result.err
    table = result.csv("summary_table.csv")
    assert table["total_samples"].tolist() == [8, 8, 8]


def test_csv_classification_learns_end_to_end(
    tmp_path: Path, app: Callable[..., RunResult]
) -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 300)
    table = pd.DataFrame(generator.normal(labels[:, None], 0.2, (300, 4)), columns=list("abcd"))
    table["label"] = np.array(["low", "mid", "top"])[labels]
    table.to_csv(tmp_path / "my.csv", index=False)
    result = app(
        "data=csv",
        "data.path=my.csv",
        "model=mlp",
        "trainer.max_epochs=30",
        "data.batch_size=32",
        "scheduler.warmup_steps=0",
        "optimizer.lr=0.01",
        "~callbacks.plots",
    )
    assert result.code == 0, result.err
    assert result.csv("summary_table.csv").iloc[-1]["accuracy"] > 0.9
    assert result.status["metrics"]["test"]["total_samples"] == 30


def test_csv_regression_learns_and_has_no_total_correct(
    tmp_path: Path, app: Callable[..., RunResult]
) -> None:
    x = np.random.default_rng(0).normal(size=(300, 2))
    table = pd.DataFrame({"a": x[:, 0], "b": x[:, 1], "value": x @ [2.0, -1.0]})
    table.to_csv(tmp_path / "my.csv", index=False)
    result = app(
        "data=csv",
        "data.path=my.csv",
        "data.source.train.target=value",
        "data.source.train.regression=true",
        "model=mlp",
        "loss=mse",
        "metric=regression",
        "goal.metric=mae",
        "goal.mode=min",
        "optimizer.lr=0.01",
        "scheduler.warmup_steps=0",
        "trainer.max_epochs=30",
        "data.batch_size=30",
        "~callbacks.plots",
    )
    assert result.code == 0, result.err
    table = result.csv("summary_table.csv")
    assert "total_correct" not in table
    assert table["mae"].iloc[-1] < 0.2


def test_image_folder_trains_and_tests_again_end_to_end(
    tmp_path: Path, app: Callable[..., RunResult]
) -> None:
    images, labels = mnist(train=False).tensors
    for stage, indices in (("train", range(60)), ("test", range(60, 80))):
        for number in indices:
            folder = tmp_path / "images" / stage / ("even" if labels[number] % 2 == 0 else "odd")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[number, 0].numpy()).save(folder / f"{number}.png")
    result = app(
        "data=image_folder",
        "data.path=images",
        "data.num_classes=2",
        "data.image_size=32",
        "data.batch_size=16",
        "model=lenet",
        "trainer.max_epochs=2",
        "~callbacks.plots",
    )
    assert result.code == 0, result.err + result.out
    table = result.csv("summary_table.csv")
    assert table["total_samples"].tolist().count(54) == 2
    again = app("mode=test", f"ckpt={result.folder}")
    assert again.code == 0, again.err
    first, second = (
        pd.read_csv(folder / "test_summary_table.csv")["loss_mean"][0] for folder in again.folders
    )
    assert first == second


def test_multirun_runs_every_combination(app: Callable[..., RunResult]) -> None:
    result = app("-m", "model=mlp,lenet", "optimizer.lr=0.1,0.01", "debug=fast", "~callbacks.plots")
    assert result.code == 0, result.err
    folders = sorted((result.cwd / "outputs" / "sweeps").glob("*/*/*/status.json"))
    assert len(folders) == 4
    statuses = [json.loads(path.read_text()) for path in folders]
    assert {status["status"] for status in statuses} == {"completed"}


def test_deleted_callbacks_write_no_files(app: Callable[..., RunResult]) -> None:
    result = app("model=mlp", "debug=fast", "~callbacks.plots", "~callbacks.tables")
    assert result.code == 0, result.err
    assert not (result.folder / "plots").exists()
    assert not (result.folder / "epoch_details").exists()


def test_metric_from_user_file_is_measured(tmp_path: Path, app: Callable[..., RunResult]) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch, torchmetrics\n"
        "class Samples(torchmetrics.Metric):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.add_state('n', torch.zeros(()), dist_reduce_fx='sum')\n"
        "    def update(self, outputs, targets):\n"
        "        self.n += len(targets)\n"
        "    def compute(self):\n"
        "        return self.n\n"
    )
    metric = "+metric.valid.samples={_target_: mine.Samples}"
    result = app(
        *("model=mlp", "debug=fast", "~callbacks.plots", metric),
        *("trusted_targets=[mine]", "goal.metric=samples"),
    )
    assert result.code == 0, result.err
    assert result.csv("valid_summary_table.csv")["samples"][0] == 256
