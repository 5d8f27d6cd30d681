"""Bad input: one clear error, an exit code, nothing half-written, nothing executed."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ran, job_for, mistakes_in
from hostile import sealed
from hydra._internal.utils import get_args_parser
from torch import nn

from app.cli import report
from app.cli.main import main
from app.cli.preflight import preflight
from app.config import resolvers
from app.experiment.run import execute
from app.runtime.errors import ConfigError, StorageError, UserError, as_user_error
from app.runtime.files import atomic_write, write_text
from app.training.checkpoint.checkpoint import load_checkpoint, load_weights

EMBEDDED = Path(__file__).parents[1] / "app" / "data" / "mnist"


def lines(ran: Ran) -> list[str]:
    return [line for line in ran.err.splitlines() if line.strip()]


def test_damaged_mnist(app: Callable[..., Ran], tmp_path: Path) -> None:
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
        (np.arange(40) % 3, 28, ["data.split.valid=40"], "leave nothing of 40 training samples"),
    ],
)
def test_data_that_does_not_fit(
    app: Callable[..., Ran],
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


def test_an_output_folder_that_cannot_be_made(app: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ran = app("model=mlp", f"hydra.run.dir={tmp_path}/file/run")
    assert ran.code == 2
    assert "cannot be made" in ran.err
    assert "Traceback" not in ran.err


def test_a_run_is_never_overwritten(trained: Ran, app: Callable[..., Ran]) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.folder.rglob("*")}
    ran = app("model=mlp", f"hydra.run.dir={trained.folder}")
    assert ran.code == 2
    assert "holds a run; it is not overwritten" in ran.err
    assert before == {path: path.stat().st_mtime_ns for path in trained.folder.rglob("*")}


def test_a_missing_accelerator_is_named(app: Callable[..., Ran]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    ran = app("model=mlp", "trainer.accelerator=cuda")
    assert ran.code == 2
    assert "trainer.accelerator='cuda' is not on this machine; it has: cpu" in ran.err
    assert not (ran.cwd / "outputs").exists()


def test_a_crash_in_a_users_model_leaves_its_traceback_in_the_log(
    app: Callable[..., Ran], tmp_path: Path
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


# ---- places that are none

LONG = "x" * 300  # no file can have that name


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["resume=true"], "resume=True: allowed: null, auto, a run folder, a state in one"),
        (["resume=[a]"], "resume=['a']: allowed: null, auto, a run folder, a state in one"),
        (["resume=''"], "resume='': allowed: null, auto, a run folder, a state in one"),
        (["resume='${nope}'"], "resume does not resolve: Interpolation key 'nope' not found"),
        (["mode=test", "ckpt=1"], "ckpt=1: allowed: null, a run folder, a checkpoint file"),
        (["mode=test", "ckpt="], "ckpt='': allowed: null, a run folder, a checkpoint file"),
        (["ckpt=[a]"], "ckpt=['a']: allowed: null, a run folder, a checkpoint file"),
        (["sweep.resume=true"], "sweep.resume=True: allowed: null, the folder of a sweep"),
    ],
)
def test_a_place_is_a_text(words: list[str], told: str) -> None:
    assert mistakes_in("model=mlp", *words) == [told]


@pytest.mark.parametrize(
    ("value", "told"),
    [("'???'", "has no value"), ("'${nope}'", "does not resolve: Interpolation key 'nope'")],
)
@pytest.mark.parametrize("words", [["resume=auto"], [], ["-m", "seed=0,1"]])
def test_the_run_folder_resolves(value: str, told: str, words: list[str]) -> None:
    key = "hydra.sweep.dir" if "-m" in words else "hydra.run.dir"
    (mistake,) = refused(*words, "model=mlp", f"{key}={value}").mistakes
    assert mistake.key == key
    assert told in mistake.problem


def test_hydras_own_record_has_a_folder(elsewhere: Path) -> None:
    (mistake,) = refused("model=mlp", "hydra.output_subdir='${nope}'").mistakes
    assert str(mistake).startswith("hydra.output_subdir does not resolve")
    (elsewhere / "run").mkdir()
    (elsewhere / "run" / ".hydra").touch()
    (mistake,) = refused("model=mlp", "hydra.run.dir=run").mistakes
    assert str(mistake).endswith(".hydra is a file, and would be a folder of the run")
    (elsewhere / "run" / ".hydra").unlink()
    (elsewhere / "run" / ".hydra" / "config.yaml").mkdir(parents=True)
    error = refused("model=mlp", "hydra.run.dir=run")
    assert isinstance(error, StorageError)
    assert "config.yaml cannot be written" in str(error)


def refused(*words: str) -> Any:
    """What the program says before it starts anything."""
    resolvers.register()
    with pytest.raises(UserError) as error:
        preflight(get_args_parser().parse_args(list(words)))
    return error.value


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("hydra.run.dir", [f"hydra.run.dir={LONG}"]),
        ("hydra.sweep.dir", ["-m", "seed=0,1", f"hydra.sweep.dir={LONG}"]),
        ("ckpt", ["mode=test", f"ckpt={LONG}"]),
        (None, [f"ckpt={LONG}"]),
        (None, [f"resume={LONG}"]),
        (None, ["resume=auto", f"hydra.run.dir={LONG}"]),
        (None, ["--config-dir", LONG]),
    ],
)
def test_a_name_that_is_too_long_for_the_system(
    key: str | None, words: list[str], elsewhere: Path
) -> None:
    error = refused(*words, "model=mlp")
    assert str(error).endswith("cannot be read: File name too long")
    assert [mistake.key for mistake in getattr(error, "mistakes", [])] == ([key] if key else [])
    assert not [*elsewhere.iterdir()]


@pytest.mark.parametrize("word", [f"name={LONG}", f"hydra.run.dir=new/{LONG}/run"])
def test_a_name_too_long_in_a_folder_that_is_yet_to_be_made(word: str, elsewhere: Path) -> None:
    (mistake,) = refused("model=mlp", word).mistakes
    assert mistake.key == "hydra.run.dir"
    assert mistake.problem.endswith("cannot be made: a name of more than 255 bytes")
    assert not [*elsewhere.iterdir()]


def test_a_sweep_or_a_report_of_such_a_name(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["app", "-m", f"sweep.resume={LONG}"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert report.main([LONG]) == 2
    told = capsys.readouterr().err.splitlines()
    assert [line.endswith("cannot be read: File name too long") for line in told] == [0, 1, 1]
    (elsewhere / "status.json").write_text('{"status": "running"}')
    assert report.main([str(elsewhere), "--to", LONG]) == StorageError.exit_code
    assert "cannot be written: File name too long" in capsys.readouterr().err


def test_only_files_that_a_user_can_put_right_are_his_mistakes() -> None:
    with pytest.raises(OSError, match="of the program"), as_user_error():
        raise OSError("of the program")
    with (
        pytest.raises(ConfigError, match="ckpt: it cannot be read: damaged"),
        as_user_error("ckpt"),
    ):
        raise OSError("damaged")


@pytest.mark.parametrize("value", [2**63, -(2**64)])
@pytest.mark.parametrize("key", ["seed", "data.split.seed"])
def test_a_seed_has_a_range(key: str, value: int) -> None:
    (mistake,) = mistakes_in("model=mlp", f"{key}={value}")
    assert mistake.startswith(f"{key}={value} does not fit; allowed: a whole number")
    assert mistake.endswith("and at most 9223372036854775807")
    assert not mistakes_in("model=mlp", f"{key}={2**63 - 1}")


@pytest.mark.parametrize("key", ["trainer.max_steps", "model.num_classes"])
def test_a_number_that_no_checkpoint_holds(key: str) -> None:
    (mistake,) = mistakes_in("model=mlp", f"{key}={2**64}")
    assert mistake == f"{key}={2**64} does not fit into a checkpoint; allowed: 64 bits"


# ---- checkpoints


@pytest.fixture
def copy(trained: Ran, tmp_path: Path) -> Path:
    """A checkpoint that may be damaged."""
    return Path(shutil.copy(trained.folder / "checkpoints" / "best.pt", tmp_path / "copy.pt"))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_checkpoint(copy: Path, share: float) -> None:
    content = copy.read_bytes()
    copy.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=r"copy\.pt is truncated or no checkpoint"):
        load_checkpoint(copy)


def test_a_checkpoint_with_a_flipped_byte(copy: Path) -> None:
    content = bytearray(copy.read_bytes())
    content[len(content) // 2] ^= 1
    copy.write_bytes(content)
    with pytest.raises(UserError, match=r"copy\.pt is (damaged|truncated)"):
        load_checkpoint(copy)


class Evil:
    """A pickle that runs code when it is loaded without care."""

    def __reduce__(self) -> Any:
        return (os.system, ("touch was_here",))


def test_a_checkpoint_with_code_in_it_is_refused_and_not_run(elsewhere: Path) -> None:
    (elsewhere / "evil.pt").write_bytes(sealed({"format": 1, "model": Evil()}))
    with pytest.raises(UserError, match="holds more than tensors and plain values; refused"):
        load_checkpoint(elsewhere / "evil.pt")
    (elsewhere / "plain.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="truncated or no checkpoint"):
        load_checkpoint(elsewhere / "plain.pt")
    assert not (elsewhere / "was_here").exists()


def test_a_strangers_checkpoint_on_the_command_line(
    app: Callable[..., Ran], tmp_path: Path
) -> None:
    (tmp_path / "evil.pt").write_bytes(sealed({"model": Evil()}))
    ran = app("mode=test", "ckpt=evil.pt")
    assert ran.code == 2
    assert len(lines(ran)) == 1
    assert "refused" in ran.err
    assert not (tmp_path / "was_here").exists()
    assert not (tmp_path / "outputs").exists()


def test_a_strangers_config_cannot_name_what_is_not_allowed(
    trained: Ran, app: Callable[..., Ran], tmp_path: Path
) -> None:
    content = torch.load(trained.folder / "checkpoints" / "best.pt", weights_only=True)
    content["config"] = content["config"].replace("app.models.mlp.MLP", "os.system")
    (tmp_path / "sly.pt").write_bytes(sealed(content))
    ran = app("mode=test", "ckpt=sly.pt")
    assert ran.code == 2
    assert "nothing of it was imported:\n  model._target_='os.system'\n" in ran.err
    content["config"] = content["config"].replace(
        '"trusted_targets": []', '"trusted_targets": ["os"]'
    )
    (tmp_path / "sly.pt").write_bytes(sealed(content))
    ran = app("mode=test", "ckpt=sly.pt")
    assert ran.code == 2
    assert "nothing of it was imported:\n  model._target_='os.system'\n" in ran.err


@pytest.mark.parametrize("content", [{"model": {}}, [1, 2], {"format": 99}])
def test_a_file_of_another_program(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match="has no checksum: it is damaged, or not of this program"):
        load_checkpoint(tmp_path / "a.pt")
    (tmp_path / "a.pt").write_bytes(sealed(content))
    with pytest.raises(UserError, match=r"is no checkpoint of this program|this program reads 3"):
        load_checkpoint(tmp_path / "a.pt")


def test_a_zip_that_is_no_checkpoint(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a.txt", "text")
    with pytest.raises(UserError, match="has no checksum"):
        load_checkpoint(tmp_path / "a.pt")


def test_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"holds no checkpoint: no checkpoints/best\.pt or last\.pt"
    ):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"weight": torch.zeros(2, 3)}, "it has no 'bias'"),
        ({"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}, r"'weight' is of shape \[2, 4\]"),
        (
            {"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "more": torch.zeros(1)},
            "the model has no more",
        ),
    ],
)
def test_weights_of_another_architecture(state: dict[str, torch.Tensor], said: str) -> None:
    with pytest.raises(UserError, match=f"a.pt is of another architecture: {said}"):
        load_weights(nn.Linear(3, 2), state, "a.pt")


# ---- files


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    write_text(path, "old")

    def fail(file: Any) -> None:
        file.write(b"half of it")
        raise OSError("disk full")

    with pytest.raises(StorageError, match="disk full"):
        atomic_write(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("key", ["metric.test", "loss"])
def test_a_name_cannot_reach_out_of_the_folder(key: str, elsewhere: Path) -> None:
    folder = elsewhere / "conf" / "experiment"
    folder.mkdir(parents=True)
    group, _, stage = key.partition(".")
    node = "{_target_: app.metrics.function.CorrectPredictions}"
    inner = f"'/../../evil': {node}"
    text = f"{group}: {{{stage}: {{{inner}}}}}" if stage else f"{group}: {{{inner}}}"
    (folder / "evil.yaml").write_text(f"# @package _global_\n{text}\n")
    found = mistakes_in("--config-dir", "conf", "experiment=evil")
    assert any("names a column and a file" in mistake for mistake in found)


def test_columns_of_the_tables_are_no_names_for_metrics() -> None:
    node = "{_target_: app.metrics.function.CorrectPredictions}"
    (mistake,) = mistakes_in(f"+metric.valid.total_samples={node}")
    assert mistake == "metric.valid.total_samples is the name of another column; rename it"


def test_status_says_failed_where_the_goal_is_no_number(elsewhere: Path) -> None:
    metric = "metric/single@metric.train=[accuracy_per_class]"
    words = ("model=mlp", "debug=fast", metric, "goal.metric=train/accuracy_per_class")
    job = job_for(*words)
    with pytest.raises(UserError, match="is not measured as a number in train"):
        execute(job, elsewhere / "run")
    assert json.loads((elsewhere / "run" / "status.json").read_text())["status"] == "failed"


def test_targets_that_would_be_spread_over_outputs_are_refused(elsewhere: Path) -> None:
    """(N, 1) against (N,) gives a loss, but never the one that was meant."""
    rows = "\n".join(f"{value},{2 * value}" for value in range(40))
    (elsewhere / "table.csv").write_text(f"x,y\n{rows}\n")
    words = ["data=csv", "data.path=table.csv", "data.num_classes=null", "data.input_shape=[1]"]
    words += ["data.source.train.target=y", "data.source.train.regression=true", "model=mlp"]
    words += ["++model.num_classes=2", "loss=mse", "metric=none", "goal.metric=loss"]
    job = job_for(*words, "goal.mode=min", "debug=fast", "data.normalize=null")
    with pytest.raises(UserError, match=r"loss\.mse: cannot take outputs .*Using a target size"):
        execute(job, elsewhere / "run")
