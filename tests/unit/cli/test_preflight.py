"""Checks of folders and files before a run starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser

from app.cli.preflight import preflight
from app.config import resolvers
from app.config.compose import open_composer
from app.runtime.errors import ConfigError, StorageError, UserError
from tests.support.permissions import permissions


def preflight_error(*overrides: str) -> UserError:
    resolvers.register()
    args = get_args_parser().parse_args(["model=mlp", *overrides])
    with pytest.raises(UserError) as error, open_composer(args) as composer:
        preflight(composer)
    return error.value


@pytest.mark.parametrize(("name", "mode"), [("", 0), ("checkpoints", 0), ("checkpoints", 0o400)])
@pytest.mark.parametrize(
    "overrides", ["resume=auto hydra.run.dir=run", "resume=run", "mode=test ckpt=run"]
)
def test_preflight_unreadable_run_folder_is_reported(
    tmp_cwd: Path, name: str, mode: int, overrides: str
) -> None:
    (tmp_cwd / "run" / "checkpoints").mkdir(parents=True)
    (tmp_cwd / "run" / "checkpoints" / "last.safetensors").touch()
    with permissions(tmp_cwd / "run" / name, mode):
        message = str(preflight_error(*overrides.split()))
    assert str(tmp_cwd / "run" / name) in message
    assert message.endswith("cannot be read: Permission denied")


@pytest.mark.parametrize("name", ["", ".hydra", "epoch_details"])
def test_preflight_new_run_in_unreadable_folder_is_reported(tmp_cwd: Path, name: str) -> None:
    (tmp_cwd / "run" / name).mkdir(parents=True)
    with permissions(tmp_cwd / "run" / name, 0):
        message = str(preflight_error("hydra.run.dir=run"))
    assert message.endswith("cannot be read: Permission denied")


@pytest.mark.parametrize("name", ["run.log", "sweep.log", ".hydra/config.yaml"])
def test_preflight_unwritable_file_raises_storage_error(tmp_cwd: Path, name: str) -> None:
    file = tmp_cwd / "run" / name
    file.parent.mkdir(parents=True)
    file.touch()
    with permissions(file, 0o444):
        error = preflight_error("hydra.run.dir=run")
    assert str(error) == f"{file} cannot be written: Permission denied"
    assert isinstance(error, StorageError)
    file.unlink()
    file.mkdir()
    message = str(preflight_error("hydra.run.dir=run"))
    assert message == f"{file} cannot be written: Is a directory"


def test_preflight_resume_with_folder_as_status_is_config_error(tmp_cwd: Path) -> None:
    (tmp_cwd / "run" / "status.json").mkdir(parents=True)
    error = preflight_error("hydra.run.dir=run", "resume=auto")
    assert isinstance(error, ConfigError)
    assert "status.json is a folder" in str(error)


def test_preflight_folder_that_takes_no_files_is_named_as_typed() -> None:
    message = str(preflight_error("hydra.run.dir=/proc/nope/run"))
    assert message.startswith("/proc/nope/run cannot be created: /proc does not take files: ")


@pytest.mark.usefixtures("tmp_cwd")
def test_preflight_warns_of_many_ranks_and_of_a_search_without_multirun(
    capsys: pytest.CaptureFixture[str],
) -> None:
    resolvers.register()
    overrides = ["model=mlp", "trainer.devices=1000", "data.batch_size=1000"]
    for more in ([], ["hydra/sweeper=optuna", "sweep.max_retries=1"]):
        args = get_args_parser().parse_args([*overrides, *more])
        with open_composer(args) as composer:
            preflight(composer)
    ranks, _, unused = capsys.readouterr().err.splitlines()
    assert ranks.startswith("warning: trainer.devices=1000 starts 1000 processes on ")
    assert unused == (
        "warning: hydra/sweeper=optuna sweep.max_retries=1 has no effect without -m, which starts "
        "a sweep"
    )
