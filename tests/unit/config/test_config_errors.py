"""Bad input: one clear error, an exit code, nothing half-written, nothing executed."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra._internal.utils import get_args_parser
from torch import nn

from app.cli import report
from app.cli.main import main
from app.cli.preflight import preflight
from app.config import resolvers
from app.runtime.errors import ConfigError, StorageError, UserError, as_user_error
from app.runtime.files import atomic_write, write_text
from app.training.checkpoint.checkpoint import load_checkpoint, load_weights
from tests.support.hostile_files import Evil, sealed
from tests.support.runs import mistakes_in

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


def test_a_checkpoint_with_code_in_it_is_refused_and_not_run(elsewhere: Path) -> None:
    (elsewhere / "evil.pt").write_bytes(sealed({"format": 1, "model": Evil()}))
    with pytest.raises(UserError, match="holds more than tensors and plain values; refused"):
        load_checkpoint(elsewhere / "evil.pt")
    (elsewhere / "plain.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="truncated or no checkpoint"):
        load_checkpoint(elsewhere / "plain.pt")
    assert not (elsewhere / "was_here").exists()


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
