"""Whole runs of the program on real MNIST: what they leave, and whether it is true."""

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
from app.data.split import split
from tests.support.runs import FEW, Ran

FOLDER = {
    ".hydra",
    ".lock",
    ".owner.json",
    "checkpoints",
    "config.yaml",
    "epoch_details",
    "model.pt",
    "plots",
    "run.log",
    "status.json",
    "summary_table.csv",
    "test_summary_table.csv",
    "train_summary_table.csv",
    "valid_summary_table.csv",
}


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))


def weights_of(folder: Path) -> nn.Sequential:
    """The model of a run, loaded with torch alone."""
    state = torch.load(folder / "model.pt", weights_only=True)
    model = mlp()
    model.load_state_dict(dict(zip(model.state_dict(), state.values(), strict=True)))
    return model.eval()


# ---- what a run leaves


def test_the_folder_says_everything(trained: Ran) -> None:
    assert {path.name for path in trained.folder.iterdir()} == FOLDER
    details = {path.name for path in (trained.folder / "epoch_details").iterdir()}
    assert {f"epoch00{n}_{stage}.csv" for n in (1, 2) for stage in ("train", "valid")} < details
    assert len([name for name in details if name.endswith("_test.csv")]) == 1
    assert {path.name for path in (trained.folder / "checkpoints").iterdir()} == {
        "best.pt",
        "last.pt",
        "last-1.pt",
    }


def test_iterations_have_a_line_each(trained: Ran) -> None:
    table = trained.csv("epoch_details/epoch002_train.csv")
    expected = "epoch iter stage loss num_samples accuracy total_correct lr iter_time"
    assert list(table.columns) == expected.split()
    assert table["iter"].tolist() == [1, 2, 3, 4, 5, 6]
    assert set(table["stage"]) == {"train"}
    assert (table["iter_time"] > 0).all()


def test_summary_tables_are_sorted_and_agree(trained: Ran) -> None:
    table = trained.csv("summary_table.csv")
    stages = list(zip(table["epoch"], table["stage"], strict=True))
    best = int(table[table["stage"] == "test"]["epoch"].iloc[0])
    expected = [(1, "train"), (1, "valid"), (2, "train"), (2, "valid")]
    expected.insert(2 * best, (best, "test"))
    assert stages == expected
    for stage in ("train", "valid", "test"):
        own = trained.csv(f"{stage}_summary_table.csv")
        rows = table[table["stage"] == stage].dropna(axis="columns").reset_index(drop=True)
        pd.testing.assert_frame_equal(own, rows, check_dtype=False)
    columns = (
        "epoch stage loss_mean loss_std total_samples accuracy total_correct epoch_time samples/s"
    )
    assert list(trained.csv("train_summary_table.csv").columns) == columns.split()


@pytest.mark.parametrize("stage", ["train", "valid"])
def test_the_summary_is_what_the_iterations_add_up_to(trained: Ran, stage: str) -> None:
    table = trained.csv(f"epoch_details/epoch001_{stage}.csv")
    row = trained.csv(f"{stage}_summary_table.csv").iloc[0]
    counts = table["num_samples"].to_numpy()
    assert row["total_samples"] == counts.sum()
    assert row["total_correct"] == table["total_correct"].sum()
    assert row["accuracy"] == row["total_correct"] / row["total_samples"]
    mean = np.average(table["loss"], weights=counts)
    assert row["loss_mean"] == pytest.approx(mean, rel=1e-12)
    spread = np.sqrt(np.average((table["loss"] - mean) ** 2, weights=counts))
    assert row["loss_std"] == pytest.approx(spread, rel=1e-9)
    assert row["samples/s"] == pytest.approx(counts.sum() / row["epoch_time"])


def test_the_test_row_is_that_of_an_independent_recomputation(trained: Ran) -> None:
    images, labels = mnist(train=False).tensors
    with torch.no_grad():
        logits = weights_of(trained.folder)((images.float() / 255 - 0.1307) / 0.3081)
    row = trained.csv("test_summary_table.csv").iloc[0]
    assert row["total_correct"] == (logits.argmax(1) == labels).sum().item()
    assert row["accuracy"] == row["total_correct"] / 10_000
    # float32 sums in another order
    assert row["loss_mean"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    epoch = int(row["epoch"])
    matrix = trained.csv(f"epoch_details/epoch00{epoch}_test_confusion_matrix.csv").to_numpy()
    expected = np.zeros((10, 10), int)
    np.add.at(expected, (labels.numpy(), logits.argmax(1).numpy()), 1)
    assert (matrix == expected).all()


def test_the_valid_rows_are_those_of_the_split(trained: Ran) -> None:
    valid = split({"train": mnist(train=True)}, 5000, None, seed=0)["valid"]
    images, labels = (tensor[:150] for tensor in valid.tensors)  # type: ignore[attr-defined]
    with torch.no_grad():
        logits = weights_of(trained.folder)((images.float() / 255 - 0.1307) / 0.3081)
    table = trained.csv("valid_summary_table.csv")
    best = table.loc[table["accuracy"].idxmax()]
    assert best["total_correct"] == (logits.argmax(1) == labels).sum().item()


def test_status_says_how_it_went(trained: Ran) -> None:
    status = trained.status
    assert status["status"] == "completed"
    assert (status["tags"], status["notes"], status["seed"]) == (["a", "b"], "a note", 0)
    assert status["peak_memory_bytes"] > 100e6
    assert torch.__version__.startswith(status["versions"]["torch"])
    table = trained.csv("valid_summary_table.csv")
    assert status["best"]["value"] == table["accuracy"].max()
    assert status["best"]["epoch"] == table["epoch"][table["accuracy"].idxmax()]
    assert status["metrics"]["test"]["total_samples"] == 10_000


def test_the_log_begins_with_a_report_and_ends_with_the_folder(trained: Ran) -> None:
    log = (trained.folder / "run.log").read_text()
    for part in (
        "model     app.models.mlp.MLP, 101,770 parameters",
        "train 300 samples in 6 batches; valid 150 samples in 3 batches; test 10,000 samples",
        "goal      max accuracy; early stop off",
        "notes     [a] [b] a note",
        "expected end",
        "best accuracy",
        f"everything is in {trained.folder}",
    ):
        assert part in log


def test_the_plots_are_pictures(trained: Ran) -> None:
    names = {path.name for path in (trained.folder / "plots").iterdir()}
    assert {"loss.png", "accuracy.png", "test_confusion_matrix.png"} < names
    for path in (trained.folder / "plots").iterdir():
        with Image.open(path) as picture:
            assert picture.size[0] > 300


def test_without_a_terminal_there_are_plain_lines_and_no_bar(trained: Ran) -> None:
    assert "\r" not in trained.out + trained.err
    assert "it/s" not in trained.err
    assert "loss_mean" in trained.out


def test_on_a_terminal_there_is_a_bar(tmp_path: Path) -> None:
    words = ("model=mlp", "trainer.max_epochs=1", "data.batch_size=1000", "~callbacks.plots")
    command = [sys.executable, "-m", "app", *words]
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    with subprocess.Popen(command, cwd=tmp_path, stdout=child, stderr=child) as process:
        os.close(child)
        shown = b""
        while True:
            try:
                piece = os.read(parent, 65536)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            shown += piece
        assert process.wait() == 0
    os.close(parent)
    text = shown.decode()
    assert "epoch 1 train:" in text
    assert "samples/s" in text
    assert "55.0k" in text


# ---- testing what was trained


def test_mode_test_reproduces_the_test_to_the_last_digit(
    trained: Ran, app: Callable[..., Ran]
) -> None:
    timed = ["epoch_time", "samples/s"]
    expected = trained.csv("test_summary_table.csv").drop(columns=timed)
    again = app("mode=test", f"ckpt={trained.folder}")
    assert again.code == 0, again.err
    pd.testing.assert_frame_equal(again.csv("test_summary_table.csv").drop(columns=timed), expected)
    assert again.config["model"] == trained.config["model"], "not today's default, which is alexnet"
    assert again.folder.name.endswith("_test_mlp_mnist")


def test_mode_valid_reproduces_the_validation(trained: Ran, app: Callable[..., Ran]) -> None:
    timed = ["epoch_time", "samples/s"]
    table = trained.csv("valid_summary_table.csv").drop(columns=timed)
    file = trained.folder / "checkpoints" / "last.pt"
    again = app("mode=valid", f"ckpt={file}")
    assert again.code == 0, again.err
    found = again.csv("valid_summary_table.csv").drop(columns=timed)
    pd.testing.assert_frame_equal(found, table[table["epoch"] == 2].reset_index(drop=True))


def test_what_is_typed_is_laid_over_the_saved_configuration(
    trained: Ran, app: Callable[..., Ran]
) -> None:
    ran = app(
        "mode=test",
        f"ckpt={trained.folder}",
        "data.batch_size=32",
        "metric/single@metric.test=[accuracy,auroc]",
    )
    assert ran.code == 0, ran.err
    assert "differs from the saved run: data.batch_size: 50 -> 32" in ran.out
    assert (
        len(
            ran.csv(
                f"epoch_details/epoch00{ran.csv('test_summary_table.csv')['epoch'][0]}_test.csv"
            )
        )
        == 313
    )
    before, after = (x.csv("test_summary_table.csv") for x in (trained, ran))
    assert before["total_correct"][0] / 10_000 == after["accuracy"][0]
    assert 0.5 < after["auroc"][0] <= 1


def test_another_model_or_split_than_that_of_the_run_is_refused(
    trained: Ran, app: Callable[..., Ran]
) -> None:
    ran = app("mode=test", f"ckpt={trained.folder}", "model=lenet", "data.split.seed=1")
    assert ran.code == 2
    assert "model._target_: 'app.models.mlp.MLP' -> 'app.models.lenet.LeNet'" in ran.err
    assert "data.split.seed: 0 -> 1: the run was trained so" in ran.err
    assert not (ran.cwd / "outputs").exists()


def test_a_typed_key_reaches_what_is_made_of_it(tmp_path: Path, app: Callable[..., Ran]) -> None:
    generator = np.random.default_rng(0)
    for name, classes in (("a.npz", 3), ("b.npz", 2)):
        labels = generator.integers(0, classes, 60)
        np.savez(tmp_path / name, x=generator.normal(labels[:, None], 0.1, (60, 4)), y=labels)
    words = ("data=npz", "data.num_classes=3", "data.input_shape=[4]", "model=mlp")
    trained = app(*words, "data.path=a.npz", "trainer.max_epochs=2", "data.batch_size=10")
    assert trained.code == 0, trained.err
    ran = app("mode=test", f"ckpt={trained.folder}", "data.path=b.npz")
    assert ran.code == 0, ran.err
    assert str(tmp_path / "b.npz") in ran.out
    # The template keeps the interpolation: the source follows data.path.
    config = ran.folders[-1] / "config.yaml"
    assert f"path: {tmp_path / 'b.npz'}" in config.read_text()


# ---- options, each doing what it says


@pytest.mark.parametrize(
    "words",
    [
        ("trainer.precision=bf16",),
        ("trainer.precision=fp16", "trainer.gradient_clip_norm=1.0"),
        ("trainer.deterministic=true", "trainer.channels_last=false"),
        ("trainer.compile=true",),
    ],
)
def test_ways_of_computing(app: Callable[..., Ran], words: tuple[str, ...]) -> None:
    short = ("trainer.max_epochs=1", "trainer.limit_test_batches=2", "~callbacks.plots", *FEW)
    ran = app("model=mlp", *short, *words)
    assert ran.code == 0, ran.err + ran.out
    assert ran.csv("train_summary_table.csv")["loss_mean"][0] < 3
    keys = torch.load(ran.folder / "model.pt", weights_only=True).keys()
    assert not any("_orig_mod" in key for key in keys)
    name = words[0].partition("precision=")[2] or "fp32"
    assert f"threads), {name}" in ran.out


def test_bf16_computes_in_bf16(tmp_path: Path, app: Callable[..., Ran]) -> None:
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
    words = ("model=own_file", "model._target_=spy.Net", "trusted_targets=[spy]", "debug=fast")
    assert app(*words, "trainer.precision=bf16", "~callbacks.plots").code == 0
    assert (tmp_path / "dtype").read_text() == "torch.bfloat16"


def test_two_runs_of_one_seed_are_equal_and_of_two_seeds_are_not(app: Callable[..., Ran]) -> None:
    for seed in (0, 0, 1):
        ran = app("model=cnn", "debug=fast", "~callbacks.plots", f"seed={seed}")
        assert ran.code == 0, ran.err
    first, second, third = (
        torch.load(folder / "model.pt", weights_only=True) for folder in ran.folders
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["classifier.weight"], third["classifier.weight"])


def test_fast_dev_run_is_one_epoch_of_one_batch(app: Callable[..., Ran]) -> None:
    ran = app("model=alexnet", "trainer.fast_dev_run=true", "data.batch_size=8")
    assert ran.code == 0, ran.err
    table = ran.csv("summary_table.csv")
    assert table["total_samples"].tolist() == [8, 8, 8]


def test_own_table_end_to_end(tmp_path: Path, app: Callable[..., Ran]) -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 300)
    table = pd.DataFrame(generator.normal(labels[:, None], 0.2, (300, 4)), columns=list("abcd"))
    table["label"] = np.array(["low", "mid", "top"])[labels]
    table.to_csv(tmp_path / "my.csv", index=False)
    ran = app(
        "data=csv",
        "data.path=my.csv",
        "data.num_classes=3",
        "data.input_shape=[4]",
        "data.source.train.classes=[low,mid,top]",
        "model=mlp",
        "trainer.max_epochs=30",
        "data.batch_size=32",
        "scheduler.warmup_steps=0",
        "optimizer.lr=0.01",
    )
    assert ran.code == 0, ran.err
    assert ran.csv("summary_table.csv").iloc[-1]["accuracy"] > 0.9
    assert ran.status["metrics"]["test"]["total_samples"] == 30


def test_regression_end_to_end_has_no_total_correct(
    tmp_path: Path, app: Callable[..., Ran]
) -> None:
    x = np.random.default_rng(0).normal(size=(300, 2))
    table = pd.DataFrame({"a": x[:, 0], "b": x[:, 1], "value": x @ [2.0, -1.0]})
    table.to_csv(tmp_path / "my.csv", index=False)
    ran = app(
        "data=csv",
        "data.path=my.csv",
        "data.num_classes=null",
        "data.input_shape=[2]",
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
    )
    assert ran.code == 0, ran.err
    table = ran.csv("summary_table.csv")
    assert "total_correct" not in table
    assert table["mae"].iloc[-1] < 0.2


def test_image_folder_end_to_end(tmp_path: Path, app: Callable[..., Ran]) -> None:
    images, labels = mnist(train=False).tensors
    for stage, picked in (("train", range(60)), ("test", range(60, 80))):
        for number in picked:
            folder = tmp_path / "pictures" / stage / ("even" if labels[number] % 2 == 0 else "odd")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[number, 0].numpy()).save(folder / f"{number}.png")
    ran = app(
        "data=image_folder",
        "data.path=pictures",
        "data.num_classes=2",
        "data.image_size=32",
        "data.batch_size=16",
        "model=lenet",
        "trainer.max_epochs=2",
    )
    assert ran.code == 0, ran.err + ran.out
    table = ran.csv("summary_table.csv")
    assert table["total_samples"].tolist().count(54) == 2
    again = app("mode=test", f"ckpt={ran.folder}")
    assert again.code == 0, again.err
    first, second = (
        pd.read_csv(folder / "test_summary_table.csv")["loss_mean"][0] for folder in again.folders
    )
    assert first == second


def test_a_sweep_runs_every_combination(app: Callable[..., Ran]) -> None:
    ran = app("-m", "model=mlp,lenet", "optimizer.lr=0.1,0.01", "debug=fast")
    assert ran.code == 0, ran.err
    folders = sorted((ran.cwd / "outputs" / "sweeps").glob("*/*/*/status.json"))
    assert len(folders) == 4
    states = [json.loads(path.read_text()) for path in folders]
    assert {state["status"] for state in states} == {"completed"}


def test_callbacks_can_be_taken_away(app: Callable[..., Ran]) -> None:
    ran = app("model=mlp", "debug=fast", "~callbacks.plots", "~callbacks.tables")
    assert ran.code == 0, ran.err
    assert not (ran.folder / "plots").exists()
    assert not (ran.folder / "epoch_details").exists()


def test_a_metric_of_the_users_own_file(tmp_path: Path, app: Callable[..., Ran]) -> None:
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
    own = "+metric.valid.samples={_target_: mine.Samples}"
    ran = app("model=mlp", "debug=fast", own, "trusted_targets=[mine]", "goal.metric=samples")
    assert ran.code == 0, ran.err
    assert ran.csv("valid_summary_table.csv")["samples"][0] == 256
