"""Bad input: one clear error, an exit code, nothing half-written, nothing executed."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from app.experiment.run import execute
from app.runtime.errors import UserError
from app.training.checkpoint.checkpoint import load_checkpoint
from tests.support.hostile_files import MaliciousPickle, checkpoint_bytes
from tests.support.runs import RunResult, job_for

EMBEDDED = Path(__file__).parents[2] / "app" / "data" / "mnist"


def lines(ran: RunResult) -> list[str]:
    return [line for line in ran.err.splitlines() if line.strip()]


def test_damaged_mnist(app: Callable[..., RunResult], tmp_path: Path) -> None:
    for file in EMBEDDED.glob("*.gz"):
        shutil.copy(file, tmp_path)
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[5000] ^= 1
    path.write_bytes(gzip.compress(bytes(content)))
    ran = app("model=mlp", f"+data.source.train.root={tmp_path}")
    assert ran.code == 1
    assert "train-labels-idx1-ubyte.gz is damaged: its content has MD5" in ran.err
    assert len(lines(ran)) == 1
    assert ran.status["status"] == "failed"
    assert "is damaged" in ran.status["error"]


def arrays(path: Path, labels: np.ndarray, side: int = 28) -> None:
    np.savez(path, x=np.zeros((len(labels), side, side), np.uint8), y=labels)


@pytest.mark.parametrize(
    ("labels", "side", "words", "said"),
    [
        (np.array([], int), 28, [], "data.source.train has no samples"),
        (np.arange(40) % 4, 28, [], "data.num_classes=3, but data.source.train has the label 3"),
        (np.arange(40) % 3, 30, [], "data.input_shape=[1, 28, 28], but the train samples are of"),
        (
            np.arange(40) % 3,
            16,
            ["data.input_shape=[1,16,16]", "model=cnn", "model.channels=[8,8,8,8,8]"],
            "model: CNN cannot take a float32 tensor of shape [2, 1, 16, 16]",
        ),
        (np.arange(40) % 3, 28, ["model.num_classes=4"], "but the model gives 4 outputs"),
        (np.arange(40) % 3, 28, ["loss=mse"], "loss.mse: cannot take outputs (a float32 tensor of"),
        (np.arange(40) % 3, 28, ["data.split.valid=40"], "leave none of the 40 training samples"),
    ],
)
def test_data_that_does_not_fit(
    app: Callable[..., RunResult],
    tmp_path: Path,
    labels: np.ndarray,
    side: int,
    words: list[str],
    said: str,
) -> None:
    arrays(tmp_path / "a.npz", labels, side)
    base = ("data=npz", "data.path=a.npz", "data.num_classes=3", "model=lenet")
    shape = () if any("input_shape" in word for word in words) else ("data.input_shape=[1,28,28]",)
    ran = app(*base, *shape, *words)
    assert ran.code == 1
    assert said in ran.err
    assert len(lines(ran)) == 1
    assert ran.status["status"] == "failed"
    assert not (ran.folder / "checkpoints").exists()


def test_an_output_folder_that_cannot_be_made(app: Callable[..., RunResult], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ran = app("model=mlp", f"hydra.run.dir={tmp_path}/file/run")
    assert ran.code == 2
    assert "cannot be made" in ran.err
    assert "Traceback" not in ran.err


def test_a_run_is_never_overwritten(trained_run: RunResult, app: Callable[..., RunResult]) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained_run.folder.rglob("*")}
    ran = app("model=mlp", f"hydra.run.dir={trained_run.folder}")
    assert ran.code == 2
    assert "holds a run; it is not overwritten" in ran.err
    assert before == {path: path.stat().st_mtime_ns for path in trained_run.folder.rglob("*")}


def test_a_missing_accelerator_is_named(app: Callable[..., RunResult]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    ran = app("model=mlp", "trainer.accelerator=cuda")
    assert ran.code == 2
    assert "trainer.accelerator='cuda' is not on this machine; it has: cpu" in ran.err
    assert not (ran.cwd / "outputs").exists()


def test_a_crash_in_a_users_model_leaves_its_traceback_in_the_log(
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
def copy(trained_run: RunResult, tmp_path: Path) -> Path:
    """A checkpoint that may be damaged."""
    return Path(shutil.copy(trained_run.folder / "checkpoints" / "best.pt", tmp_path / "copy.pt"))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_checkpoint(copy: Path, share: float) -> None:
    content = copy.read_bytes()
    copy.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=r"copy\.pt is truncated or not a checkpoint"):
        load_checkpoint(copy)


def test_a_checkpoint_with_a_flipped_byte(copy: Path) -> None:
    content = bytearray(copy.read_bytes())
    content[len(content) // 2] ^= 1
    copy.write_bytes(content)
    with pytest.raises(UserError, match=r"copy\.pt is (damaged|truncated)"):
        load_checkpoint(copy)


def test_a_strangers_checkpoint_on_the_command_line(
    app: Callable[..., RunResult], tmp_path: Path
) -> None:
    (tmp_path / "evil.pt").write_bytes(checkpoint_bytes({"model": MaliciousPickle()}))
    ran = app("mode=test", "ckpt=evil.pt")
    assert ran.code == 2
    assert len(lines(ran)) == 1
    assert "refused" in ran.err
    assert not (tmp_path / "was_here").exists()
    assert not (tmp_path / "outputs").exists()


def test_a_strangers_config_cannot_name_what_is_not_allowed(
    trained_run: RunResult, app: Callable[..., RunResult], tmp_path: Path
) -> None:
    content = torch.load(trained_run.folder / "checkpoints" / "best.pt", weights_only=True)
    content["config"] = content["config"].replace("app.models.mlp.MLP", "os.system")
    (tmp_path / "sly.pt").write_bytes(checkpoint_bytes(content))
    ran = app("mode=test", "ckpt=sly.pt")
    assert ran.code == 2
    assert "nothing of it was imported:\n  model._target_='os.system'\n" in ran.err
    content["config"] = content["config"].replace(
        '"trusted_targets": []', '"trusted_targets": ["os"]'
    )
    (tmp_path / "sly.pt").write_bytes(checkpoint_bytes(content))
    ran = app("mode=test", "ckpt=sly.pt")
    assert ran.code == 2
    assert "nothing of it was imported:\n  model._target_='os.system'\n" in ran.err


def test_status_says_failed_where_the_goal_is_no_number(tmp_cwd: Path) -> None:
    metric = "metric/single@metric.train=[accuracy_per_class]"
    words = ("model=mlp", "debug=fast", metric, "goal.metric=train/accuracy_per_class")
    job = job_for(*words)
    with pytest.raises(UserError, match="is not measured as a number in train"):
        execute(job, tmp_cwd / "run")
    assert json.loads((tmp_cwd / "run" / "status.json").read_text())["status"] == "failed"


def test_targets_that_would_be_spread_over_outputs_are_refused(tmp_cwd: Path) -> None:
    """(N, 1) against (N,) gives a loss, but never the one that was meant."""
    rows = "\n".join(f"{value},{2 * value}" for value in range(40))
    (tmp_cwd / "table.csv").write_text(f"x,y\n{rows}\n")
    words = ["data=csv", "data.path=table.csv", "data.num_classes=null", "data.input_shape=[1]"]
    words += ["data.source.train.target=y", "data.source.train.regression=true", "model=mlp"]
    words += ["++model.num_classes=2", "loss=mse", "metric=none", "goal.metric=loss"]
    job = job_for(*words, "goal.mode=min", "debug=fast", "data.normalize=null")
    with pytest.raises(UserError, match=r"loss\.mse: cannot take outputs .*Using a target size"):
        execute(job, tmp_cwd / "run")
