"""What people type out of habit works, or gets one line that says what to type here."""

from __future__ import annotations

import os
import re
import shlex
import time
from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser

from app.cli.main import main
from app.config import resolvers
from app.config.compose import compositions
from app.config.habits import DEVICE_KEYS, KEYS, NOT_HERE, WORDS, usage
from app.experiment.job import resolve_folder
from app.experiment.shorthand import expand
from app.runtime.errors import ConfigError
from tests.support.image_files import write_image_folder
from tests.support.runs import config_issues, job_for

COMING_FROM = Path(__file__).parents[3] / "docs" / "coming-from.md"
USES = {  # unknown key -> what its error says at the end
    "epochs=3": "use trainer.max_epochs=3",
    "batch=64": "use data.batch_size=64",
    "batch_size=64": "use data.batch_size=64",
    "lr=0.1": "use optimizer.lr=0.1",
    "trainer.lr=0.1": "use optimizer.lr=0.1",
    "device=cuda": "use trainer.accelerator=cuda",
    "device=cuda:1": "use trainer.devices=[1]",
    "device=0": "use trainer.devices=[0]",
    "gpu=0": "use trainer.devices=[0]",
    "gpus=2": "use trainer.devices=2",
    "early_stopping=true": "use goal.patience=10",
    "num_workers=4": "use data.loader.num_workers=4",
    "data.num_workers=4": "use data.loader.num_workers=4",
    "test=true": "use mode=test ckpt=RUN",
    "wandb=true": "use logger=wandb",
    "task.teacher=outputs/big": "use task=distill teacher=RUN",
    "log_dir=runs": "use output=runs",
    "hparams_search=mnist_optuna": "use -m hydra/sweeper=optuna 'optimizer.lr=interval(1e-4,1e-1)'",
    "train=false": "it is not needed: every run trains, unless it has another mode: mode=test "
    "ckpt=RUN",
}
ANSWERS = {  # command line -> all that is printed below `1 error in the configuration:`
    "--epochs 3": "--epochs is not an option; keys are typed as key=value: use "
    "trainer.max_epochs=3",
    "--lr=0.1": "--lr is not an option; keys are typed as key=value: use optimizer.lr=0.1",
    "--zzz 3": "--zzz is not an option; keys are typed as key=value: for example zzz=3",
    "--config-name=foo": "--config-name='foo' does not exist; it is usually left out",
    "train": "train is not key=value; did you mean mode=train?",
    "train model=lenet": "train is not key=value; did you mean mode=train?",
    "test": "test is not key=value; did you mean mode=test ckpt=RUN?",
    "help": "help is not key=value; did you mean --help?",
    "lenet": "lenet is not key=value; for example: model=lenet trainer.max_epochs=3",
    "optimizer.lr = 0.1": "optimizer.lr = 0.1 must be typed without spaces around =",
    '"name=\'open"': "name='open has a quote that is not closed; to use the value as it is, type "
    "\"name='\\\\'open'\"",
    "optimizer.lr=0.1,0.01": "optimizer.lr=0.1,0.01 has several values; add -m to run one job for "
    "each, or type optimizer.lr=[0.1,0.01] for a list, \"optimizer.lr='0.1,0.01'\" for a text",
    "-m optimizer.lr=[0.1,0.01]": "optimizer.lr=[0.1, 0.01] is not a number; for one job per "
    "value: -m optimizer.lr=0.1,0.01",
    "-m data.batch_size=[32,64]": "data.batch_size=[32, 64] is not valid; allowed: an integer of "
    "at least 1; for one job per value: -m data.batch_size=32,64",
    "tags=a": "tags='a' is not valid; allowed: a list of: a string; did you mean 'tags=[a]'?",
    "~goal.patience": "~goal.patience: it is null, so there is nothing to remove",
    "mode=val": "mode='val' is not valid; allowed: train, valid, test, predict, export, find_lr, "
    "find_batch_size, check; did you mean 'valid'?",
    "mode=test ckpt=latest": "ckpt=latest: there is no such run in {cwd}/outputs",
    "resume=last": "resume='last' contains no run to resume: {cwd}/last does not exist; did you "
    "mean resume=latest?",
}
VALUES = {
    "optimizer.layer_decay": "0.75",  # of the keys that hints name; 3 where none is listed
    "optimizer": "sgd",
    "scheduler": "step",
    "loss": "focal",
    "model": "lenet",
    "data": "mnist",
    "data.num_classes": "10",
    "init.weights": "null",
    "data/augment": "trivial",
    "trainer.accelerator": "cpu",
    "trainer.precision": "fp32",
    "goal.metric": "accuracy",
    "output": "runs",
    "name": "mine",
    "data.path": ".",
}
NOT_COMPOSED = (
    "--cfg",
    "mode=test",
    "mode=valid",
    "mode=predict",
    "resume",
    "task=distill",
)  # need more than this
WORKS = (
    "trainer=gpu ~average scheduler=none",
    "trainer=mps callbacks=none",
    "trainer=ddp logger=[wandb,mlflow]",
    "trainer=cpu logger=csv data.path=~/pictures",
)


def run_main(line: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("sys.argv", ["app", *shlex.split(line)])
    with pytest.raises(SystemExit) as end:
        main()
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.mark.parametrize("line", ANSWERS)
def test_habit_gets_one_line_that_says_what_to_type(
    line: str, tmp_cwd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(line, monkeypatch) == 2
    head, *issues = capsys.readouterr().err.splitlines()
    assert head == "1 error in the configuration:"
    assert issues == ["  " + ANSWERS[line].format(cwd=tmp_cwd)]
    assert not list(tmp_cwd.iterdir())


def test_unknown_key_is_answered_with_the_key_here(
    tmp_cwd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(" ".join(map(shlex.quote, USES)), monkeypatch) == 2
    head, *issues = capsys.readouterr().err.splitlines()
    assert head == f"{len(USES)} errors in the configuration:"
    assert issues == [f"  {typed} is not a known key; {hint}" for typed, hint in USES.items()]
    assert not list(tmp_cwd.iterdir())


@pytest.mark.usefixtures("tmp_cwd")
@pytest.mark.parametrize("line", WORKS)
def test_habit_works(line: str) -> None:
    assert config_issues(*expand(line.split(), os.environ)) == []


@pytest.mark.usefixtures("tmp_cwd")
def test_hints_name_what_exists() -> None:
    hints = [here for here in KEYS.values() if not here.startswith(NOT_COMPOSED)]
    typed = [here if "=" in here else f"{here}={VALUES.get(here, '3')}" for here in hints]
    (search,) = [text for text in typed if text.startswith("-m ")]
    assert config_issues(*shlex.split(search)) == []
    loggers = ("logger=tensorboard", "logger=wandb", "logger=mlflow")  # a command has one of them
    others = [text for text in typed if text not in (search, *loggers)]
    assert config_issues(*others, "logger=[tensorboard,wandb,mlflow]") == []


@pytest.mark.usefixtures("tmp_cwd")
def test_habits_do_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    one = job_for("trainer=gpu", "callbacks=none", "scheduler=none").config
    other = job_for("trainer=ddp", "scheduler=constant").config
    assert one.trainer.accelerator == "gpu"
    assert other.trainer.devices == "auto"
    assert one.callbacks == {}
    assert one.scheduler == other.scheduler
    logged = job_for("logger=[wandb,tensorboard]").config.callbacks
    assert logged == job_for("callbacks/single@callbacks=[wandb,tensorboard]").config.callbacks
    assert job_for("logger=csv").config.callbacks == job_for().config.callbacks
    monkeypatch.setenv("HOME", "/home/me")
    assert expand(["data.path=~/pictures", "notes=a~/b"], {}) == [
        "data.path='/home/me/pictures'",
        "notes=a~/b",
    ]


def test_version_is_that_of_the_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main("--version", monkeypatch) == 0
    assert re.fullmatch(r"app \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


@pytest.mark.parametrize("word", ["zzz", "qwerty", "data"])
def test_no_hint_where_nothing_is_near(word: str) -> None:
    assert usage(word, 3) is None


def test_no_option_is_suggested_where_none_is_near() -> None:
    (issue,) = config_issues("data=zzz")
    assert "did you mean" not in issue


def test_table_of_docs_lists_the_same_habits() -> None:
    _, _, table = COMING_FROM.read_text().partition("| typed | here | not here |\n")
    rows = [line.strip("|").split(" | ") for line in table.splitlines() if line[:3] == "| `"]
    documented = {
        names.strip().replace("`", ""): (here.strip().strip("`"), reason.strip())
        for names, here, reason in rows
    }
    expected = {names: (here, "") for names, here in KEYS.items()}
    expected |= {names: ("", reason) for names, reason in NOT_HERE.items()}
    expected[", ".join(DEVICE_KEYS)] = ("trainer.accelerator=cuda`, `trainer.devices=[0]", "")
    expected |= {word: (here, "") for word, here in WORDS.items()}
    assert documented == expected


# ---- latest


def make_run(output: Path, name: str, *files: str) -> Path:
    folder = output / name
    (folder / "checkpoints").mkdir(parents=True)
    for file in files:
        (folder / "checkpoints" / file).touch()
    return folder


def test_latest_is_the_run_that_saved_last(tmp_cwd: Path) -> None:
    output = tmp_cwd / "outputs"
    folders = [
        make_run(output, "2026-01-01/run", "start.json", "last.safetensors"),
        make_run(output, "sweeps/2026-01-01/12/0_run", "start.json", "last.safetensors"),
        make_run(output, "mine", "start.json"),
    ]
    (output / "2026-01-02" / "test_run").mkdir(parents=True)  # a test has no checkpoints
    for age, folder in enumerate(reversed(folders)):
        os.utime(folder / "checkpoints", (time.time() - age,) * 2)
    assert expand(["resume=latest"], {}) == [f"resume='{folders[2]}'"]
    assert expand(["ckpt=latest", "mode=test"], {}) == [f"ckpt='{folders[1]}'", "mode=test"]
    moved = output.rename(tmp_cwd / "elsewhere")
    assert expand(["ckpt=latest"], {"APP_OUTPUT": str(moved)})[0].startswith(f"ckpt='{moved}")
    assert expand(["output=elsewhere", "ckpt=latest"], {})[1].startswith(f"ckpt='{moved}")
    with pytest.raises(ConfigError, match="there is no such run"):
        expand(["ckpt=latest"], {})


@pytest.mark.parametrize(
    ("environment", "typed", "expected"),
    [("", [], "outputs"), ("scratch", [], "scratch"), ("scratch", ["output=../runs"], "../runs")],
)
def test_output_is_the_folder_of_runs_and_sweeps(
    tmp_cwd: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: str,
    typed: list[str],
    expected: str,
) -> None:
    monkeypatch.delenv("APP_OUTPUT", raising=False)
    if environment:
        monkeypatch.setenv("APP_OUTPUT", environment)
    resolvers.register()
    ((composed, issues),) = compositions(get_args_parser().parse_args(typed))
    assert issues == []
    for key, folder in [("hydra.run.dir", expected), ("hydra.sweep.dir", f"{expected}/sweeps")]:
        assert resolve_folder(composed, key).is_relative_to(tmp_cwd / folder)


# ---- checks of samples, and warnings


def test_check_sends_samples_through_the_model(
    tmp_cwd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main("mode=check model=mlp model.num_classes=5", monkeypatch) == 2
    assert capsys.readouterr().err == "data.num_classes=10, but the model has 5 outputs\n"
    assert run_main("mode=check model=mlp model.num_classes=5 check=config", monkeypatch) == 0
    printed = capsys.readouterr().out
    assert printed == "the configuration is valid; no sample was sent through the model\n"
    assert run_main("mode=check model=mlp", monkeypatch) == 0
    assert capsys.readouterr().out == "the configuration is valid\n"
    assert not list(tmp_cwd.iterdir())


def test_check_of_pictures_builds_no_cache(tmp_cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image_folder(tmp_cwd / "pets", {"cat": 10, "dog": 10})
    line = (
        "mode=check model=cnn data=image_folder data.path=pets data.image_size=16 data.cache=disk "
    )
    normalize = "'data.normalize={mean: auto, std: auto}'"
    assert run_main(f"{line} {normalize} data.cache_folder=cache", monkeypatch) == 0
    assert [path.name for path in tmp_cwd.iterdir()] == ["pets"]
