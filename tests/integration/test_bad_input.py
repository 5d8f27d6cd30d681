"""Invalid input gives one clear error and an exit code; nothing is half-written or executed."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from app.experiment.run import execute
from app.runtime.errors import UserError
from app.training.checkpoint.checkpoint import load_checkpoint
from app.training.checkpoint.store import read_store
from tests.support.hostile_files import MaliciousPickle, checkpoint_bytes
from tests.support.image_files import damage_image, write_image_folder, write_jpegs
from tests.support.runs import RunResult, job_for
from tests.support.toy_datasets import copy_mnist_with_flipped_bit


def error_lines(ran: RunResult) -> list[str]:
    return [line for line in ran.err.splitlines() if line.strip()]


def test_mnist_damaged_file_fails_with_checksum_error(
    app: Callable[..., RunResult], tmp_path: Path
) -> None:
    copy_mnist_with_flipped_bit(tmp_path, "train-labels-idx1-ubyte.gz", 5000)
    ran = app("model=mlp", f"+data.source.train.root={tmp_path}")
    assert ran.code == 1
    assert "train-labels-idx1-ubyte.gz is damaged: its content has MD5" in ran.err
    assert len(error_lines(ran)) == 1
    assert ran.status["status"] == "failed"
    assert "is damaged" in ran.status["error"]


def save_arrays(path: Path, labels: np.ndarray, side: int = 28) -> None:
    np.savez(path, x=np.zeros((len(labels), side, side), np.uint8), y=labels)


@pytest.mark.parametrize(
    ("labels", "side", "overrides", "message"),
    [
        (np.array([], int), 28, [], "data.source.train has no samples"),
        (np.arange(40) % 4, 28, [], "data.num_classes=3, but data.source.train has the label 3"),
        (np.arange(40) % 3, 30, [], "data.input_shape=[1, 28, 28], but the samples have shape"),
        (np.arange(40) % 3, 28, ["data.split.valid=40"], "leave 0 of the 40 training samples"),
    ],
)
def test_data_that_contradicts_the_configuration_fails_before_a_run_folder_is_made(
    app: Callable[..., RunResult],
    tmp_path: Path,
    labels: np.ndarray,
    side: int,
    overrides: list[str],
    message: str,
) -> None:
    save_arrays(tmp_path / "a.npz", labels, side)
    base = ("data=npz", "data.path=a.npz", "data.num_classes=3", "data.input_shape=[1,28,28]")
    ran = app(*base, "model=lenet", *overrides)
    assert ran.code == 2
    assert message in ran.err
    assert len(error_lines(ran)) == 2
    assert not (ran.cwd / "outputs").exists()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("empty", "pets has no class folders; expected are at least two folders"),
        ("one class", "pets has the only class folder 'cat'; expected are at least two folders"),
        ("class without training", "pets/valid/cow: 'cow' is not a class of the training data"),
        ("damaged", "1 of 3000 images cannot be read; repair or remove them:"),
    ],
)
def test_bad_image_folder_is_one_error_before_a_run_folder_is_made(
    app: Callable[..., RunResult], tmp_path: Path, case: str, message: str
) -> None:
    pets = tmp_path / "pets"
    if case == "empty":
        pets.mkdir()
    elif case == "one class":
        write_image_folder(pets, {"cat": 4})
    elif case == "class without training":
        write_image_folder(pets / "train", {"cat": 2, "dog": 2})
        write_image_folder(pets / "valid", {"cat": 2, "cow": 2}, seed=1)
    else:
        write_jpegs(pets, ["cat", "dog"], 1500)
        damage_image(pets / "dog" / "00700.jpg")
    ran = app("data=image_folder", f"data.path={pets}", "model=cnn")
    assert ran.code == 2
    assert error_lines(ran)[0] == "1 error in the configuration:"
    assert message in error_lines(ran)[1]
    assert len(error_lines(ran)) == (3 if case == "damaged" else 2)
    assert ("dog/00700.jpg: " in ran.err) == (case == "damaged")
    assert not (ran.cwd / "outputs").exists()


@pytest.mark.parametrize(
    ("labels", "side", "overrides", "message"),
    [
        (
            np.arange(40) % 3,
            16,
            ["data.input_shape=[1,16,16]", "model=cnn", "model.channels=[8,8,8,8,8]"],
            "model: CNN cannot take a float32 tensor of shape [2, 1, 16, 16]",
        ),
        (np.arange(40) % 3, 28, ["model.num_classes=4"], "but the model has 4 outputs"),
        (np.arange(40) % 3, 28, ["loss=mse"], "loss.mse: cannot take outputs (a float32 tensor of"),
    ],
)
def test_data_that_does_not_match_model_fails_before_training(
    app: Callable[..., RunResult],
    tmp_path: Path,
    labels: np.ndarray,
    side: int,
    overrides: list[str],
    message: str,
) -> None:
    save_arrays(tmp_path / "a.npz", labels, side)
    base = ("data=npz", "data.path=a.npz", "data.num_classes=3", "model=lenet")
    shape = (
        ()
        if any("input_shape" in override for override in overrides)
        else ("data.input_shape=[1,28,28]",)
    )
    ran = app(*base, *shape, *overrides)
    assert ran.code == 1
    assert message in ran.err
    assert len(error_lines(ran)) == 1
    assert ran.status["status"] == "failed"
    assert not list(ran.folder.glob("checkpoints/*.safetensors"))


def test_run_folder_below_a_file_is_refused(app: Callable[..., RunResult], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ran = app("model=mlp", f"hydra.run.dir={tmp_path}/file/run")
    assert ran.code == 2
    assert "cannot be created" in ran.err
    assert "Traceback" not in ran.err


def test_run_folder_that_contains_a_run_is_refused(
    trained_run: RunResult, app: Callable[..., RunResult]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained_run.folder.rglob("*")}
    ran = app("model=mlp", f"hydra.run.dir={trained_run.folder}")
    assert ran.code == 2
    assert "already contains a run, which is not overwritten" in ran.err
    assert before == {path: path.stat().st_mtime_ns for path in trained_run.folder.rglob("*")}


def test_accelerator_not_available_is_refused(app: Callable[..., RunResult]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    ran = app("model=mlp", "trainer.accelerator=cuda")
    assert ran.code == 2
    assert "trainer.accelerator='cuda' is not available on this machine; available: cpu" in ran.err
    assert not (ran.cwd / "outputs").exists()


def test_exception_in_user_model_is_logged_with_traceback(
    app: Callable[..., RunResult], tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self, num_classes):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(784, num_classes))\n"
        "    def forward(self, x):\n"
        "        if self.training:\n"
        "            raise ZeroDivisionError('in my model')\n"
        "        return super().forward(x)\n"
    )
    ran = app("model=own_file", "model._target_=mine.Net", "trusted_targets=[mine]")
    assert ran.code == 1
    log = (ran.folder / "run.log").read_text()
    assert "Traceback" in log
    assert "ZeroDivisionError: in my model" in log
    assert ran.status["status"] == "failed"


# ---- checkpoints


@pytest.fixture
def checkpoint_copy(trained_run: RunResult, tmp_path: Path) -> Path:
    """Copy of a checkpoint that a test may damage."""
    return Path(
        shutil.copy(
            trained_run.folder / "checkpoints" / "best.safetensors", tmp_path / "copy.safetensors"
        )
    )


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.99])
def test_load_checkpoint_truncated_file_is_refused(checkpoint_copy: Path, fraction: float) -> None:
    content = checkpoint_copy.read_bytes()
    checkpoint_copy.write_bytes(content[: int(fraction * len(content))])
    with pytest.raises(UserError, match=r"copy\.safetensors is truncated or not a checkpoint"):
        load_checkpoint(checkpoint_copy)


def test_load_checkpoint_flipped_byte_is_refused(checkpoint_copy: Path) -> None:
    content = bytearray(checkpoint_copy.read_bytes())
    content[len(content) // 2] ^= 1
    checkpoint_copy.write_bytes(content)
    with pytest.raises(UserError, match=r"copy\.safetensors is damaged: its checksum"):
        load_checkpoint(checkpoint_copy)


def test_ckpt_with_malicious_pickle_is_refused_and_not_run(
    app: Callable[..., RunResult], tmp_path: Path
) -> None:
    (tmp_path / "evil.safetensors").write_bytes(pickle.dumps(MaliciousPickle()))
    ran = app("mode=test", "ckpt=evil.safetensors")
    assert ran.code == 2
    assert len(error_lines(ran)) == 1
    assert "is truncated or not a checkpoint" in ran.err
    assert not (tmp_path / "was_here").exists()
    assert not (tmp_path / "outputs").exists()


def test_ckpt_with_target_not_allowed_is_refused(
    trained_run: RunResult, app: Callable[..., RunResult], tmp_path: Path
) -> None:
    content = read_store(trained_run.folder / "checkpoints" / "best.safetensors")[1]
    content["config"]["model"]["_target_"] = "os.system"
    (tmp_path / "untrusted.safetensors").write_bytes(checkpoint_bytes(content))
    ran = app("mode=test", "ckpt=untrusted.safetensors")
    assert ran.code == 2
    assert "model._target_='os.system' is not allowed" in ran.err
    content["config"]["trusted_targets"] = ["os"]
    (tmp_path / "untrusted.safetensors").write_bytes(checkpoint_bytes(content))
    ran = app("mode=test", "ckpt=untrusted.safetensors")
    assert ran.code == 2
    assert "model._target_='os.system' is not allowed" in ran.err


def test_goal_metric_without_scalar_value_fails_and_updates_status(tmp_cwd: Path) -> None:
    metric = "metric/single@metric.train=[accuracy_per_class]"
    overrides = ("model=mlp", "debug=fast", metric, "goal.metric=train/accuracy_per_class")
    job = job_for(*overrides)
    with pytest.raises(UserError, match="is not measured as a number in train"):
        execute(job, tmp_cwd / "run")
    assert json.loads((tmp_cwd / "run" / "status.json").read_text())["status"] == "failed"


def test_mse_loss_targets_that_would_broadcast_are_refused(tmp_cwd: Path) -> None:
    """Broadcasting (N,) against (N, 1) gives a loss over (N, N) pairs, which is never intended."""
    rows = "\n".join(f"{value},{2 * value}" for value in range(40))
    (tmp_cwd / "table.csv").write_text(f"x,y\n{rows}\n")
    overrides = ["data=csv", "data.path=table.csv", "data.num_classes=null", "data.input_shape=[1]"]
    overrides += ["data.source.train.target=y", "data.source.train.regression=true", "model=mlp"]
    overrides += ["++model.num_classes=2", "loss=mse", "metric=none", "goal.metric=loss"]
    job = job_for(*overrides, "goal.mode=min", "debug=fast", "data.normalize=null")
    with pytest.raises(UserError, match=r"loss\.mse: cannot take outputs .*Using a target size"):
        execute(job, tmp_cwd / "run")
