"""Options of other launchers, which files may not use to run commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from app.config.overrides import parse_overrides
from app.sweep.launchers.options import has_unsafe_option
from tests.support.sweeps import sweep_errors


@pytest.mark.parametrize(
    ("launcher", "options", "errors"),
    [
        ("submitit_slurm", {"setup": ["reboot"]}, ["hydra.launcher.setup.0='reboot' can only"]),
        (
            "slurm",
            {"partition": "a\nreboot", "additional_parameters": {"a": "b\nreboot"}},
            ["hydra.launcher.partition=", "additional_parameters.a="],
        ),
        (
            "submitit_local",
            {"submitit_folder": "/tmp/theirs"},
            ["hydra.launcher.submitit_folder="],
        ),
        ("slurm", {"partition": "${notes}"}, ["hydra.launcher.partition='${notes}' can only"]),
        ("slurm", {"partition": "gpu-a.1", "mem_gb": 3}, []),
        ("joblib", {"n_jobs": 2}, []),
    ],
)
def test_launcher_options_of_file(
    launcher: str, options: dict[str, Any], errors: list[str], tmp_path: Path
) -> None:
    conf = tmp_path / "sweep"
    conf.mkdir()
    content = json.dumps({"hydra": {"launcher": options}})
    (conf / "theirs.yaml").write_text(f"# @package _global_\n{content}\n")
    command = (f"hydra/launcher={launcher}", "sweep=theirs", "model=mlp", "seed=0")
    found = sweep_errors(*command, flags=("--config-dir", str(tmp_path)))
    assert [error for error in errors if error not in found] == [], found
    assert errors or found == ""


def test_launcher_option_on_command_line_is_accepted() -> None:
    typed = ("hydra/launcher=slurm", "hydra.launcher.setup=[module load cuda]", "seed=0")
    assert sweep_errors(*typed) == ""


@pytest.mark.parametrize(
    ("override", "is_unsafe"),
    [
        ("hydra.launcher.setup=[reboot]", True),
        ("hydra.launcher={setup: [reboot]}", True),
        ("+hydra={launcher: {setup: [reboot]}}", True),
        ("+hydra.launcher.ray.init.runtime_env={pip: [theirs]}", True),
        ("hydra.launcher.ray.init.address='1.2.3.4:5'", True),
        ("hydra.launcher.ray.init.address=auto", False),
        ("hydra.launcher.slots=2", False),
        ("hydra.launcher.partition=gpu", False),
        ("hydra.sweeper.n_trials=2", False),
        ("seed=0,1", False),
    ],
)
def test_saved_launcher_option_must_be_typed_again(override: str, is_unsafe: bool) -> None:
    (parsed,) = parse_overrides([override])
    assert has_unsafe_option(parsed) is is_unsafe
