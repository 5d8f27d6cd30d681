"""Run folders with any name, and names that control the terminal."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hydra._internal.utils import get_args_parser

from app.cli.preflight import preflight
from app.config import resolvers
from app.config.compose import open_composer
from app.config.overrides import quote
from app.runtime.errors import ConfigError
from tests.support.processes import SHORT_RUN
from tests.support.runs import RunResult, job_for

NAMES = {
    "quotes": '-it\'s "50%" (é汉字😀) #1\n2',
    "sweep": "a=b,c$x [y] {z} \\",
    "long": "n" * 240,
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_run_folder_of_any_name_is_tested_exported_resumed_and_reported(
    name: str, trained_run: RunResult, app: Callable[..., RunResult], tmp_path: Path
) -> None:
    folder = tmp_path / name
    shutil.copytree(trained_run.folder, folder)
    ckpt = f"ckpt={quote(str(folder))}"
    for arguments in (
        ("mode=test", ckpt, "trainer.limit_test_batches=2"),
        ("mode=export", ckpt),
        (f"resume={quote(name)}", "trainer.max_epochs=3", "trainer.limit_train_batches=6"),
        ("report", f"./{name}"),
    ):
        result = app(*arguments)
        assert result.code == 0, result.err + result.out
    assert (folder / "checkpoints" / "last-1.safetensors").exists()
    assert (folder / "sweep.html").exists()
    names = [path.name.partition("_")[2] for path in (tmp_path / "outputs").glob("*/*")]
    assert len(names) == 2
    assert all(re.fullmatch(r"(test|export)_[\w.+=,-]+", text) for text in names)
    assert all((path / "status.json").exists() for path in (tmp_path / "outputs").glob("*/*"))


def test_errors_about_special_characters_say_what_to_type(
    app: Callable[..., RunResult], tmp_path: Path
) -> None:
    name = "it's (é)"
    refused = app(*SHORT_RUN, f"hydra.run.dir={name}")
    assert refused.code == 2
    typed = refused.err.rpartition(" type ")[2].strip()
    shell = subprocess.run(["sh", "-c", f"printf %s {typed}"], capture_output=True, text=True)
    trained = app(*SHORT_RUN, shell.stdout)
    assert trained.code == 0, trained.err
    assert (tmp_path / name / "model.pt").exists()


@pytest.mark.usefixtures("tmp_cwd")
def test_run_folder_that_hydra_would_interpolate_is_refused() -> None:
    resolvers.register()
    value = quote("a${x}")
    args = get_args_parser().parse_args([f"hydra.run.dir={value}"])
    with open_composer(args) as composer, pytest.raises(ConfigError, match="rename it"):
        preflight(composer)


def test_ckpt_that_hydra_reads_as_a_list_says_to_quote_it() -> None:
    with pytest.raises(ConfigError, match=r"quote a name that is no plain word: \"ckpt='...'\""):
        job_for("mode=test", "ckpt=[x]")


def test_control_characters_of_names_and_files_are_shown_escaped(
    app: Callable[..., RunResult], tmp_path: Path
) -> None:
    hostile = "a\x1b[31m\u202eb"
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    text = yaml.safe_dump({"notes": hostile}, allow_unicode=True)
    (tmp_path / "conf" / "experiment" / "theirs.yaml").write_text(f"# @package _global_\n{text}")
    theirs = ("--config-dir", "conf", "experiment=theirs")
    run = app(*theirs, *SHORT_RUN, f"hydra.run.dir={quote(hostile)}")
    assert run.code == 0, run.err
    for result in (
        run,
        app(*theirs, "--cfg", "job"),
        app(f"model={quote(hostile)}"),
        app("report", hostile),
        app("report", f"missing{hostile}"),
    ):
        shown = result.out + result.err
        assert r"a\x1b[31m" in shown or r"a\e[31m" in shown
        assert not set("\x1b\u202e") & set(shown)
    log = (tmp_path / hostile / "run.log").read_text()
    assert r"a\x1b[31m\u202eb" in log
    assert not set("\x1b\u202e") & set(log)
