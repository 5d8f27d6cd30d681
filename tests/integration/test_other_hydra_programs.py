"""Installing this package changes nothing for other Hydra programs in the same environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOREIGN = """
import sys
if "--without" in sys.argv:
    sys.argv.remove("--without")
    sys.modules["hydra_plugins"] = None  # as if no plugin were installed
import hydra
from hydra import compose, initialize_config_module

@hydra.main(version_base="1.3", config_path="pkg://other.conf", config_name="main")
def main(cfg):
    print("main", cfg.size, len(cfg.long))

main()
with initialize_config_module(config_module="other.conf", version_base="1.3"):
    print("module", compose("main", ["size=3"]).size)
print("imported", sorted(name for name in ("app", "torch", "optuna") if name in sys.modules))
"""
NOTEBOOK = """
import app
from app.config.compose import compositions
from hydra import compose, initialize_config_module
from hydra._internal.utils import get_args_parser

list(compositions(get_args_parser().parse_args(["model=mlp"])))
with initialize_config_module(config_module="other.conf", version_base="1.3"):
    print(compose("main").size)
"""


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A Hydra program with its configuration in a package, 2 MB of it in one file."""
    conf = tmp_path / "other" / "conf"
    conf.mkdir(parents=True)
    for folder in (conf, conf.parent):
        (folder / "__init__.py").touch()
    (conf / "main.yaml").write_text(f"size: 2\nlong: {'x' * 2_000_000}\n")
    (tmp_path / "foreign.py").write_text(FOREIGN)
    (tmp_path / "notebook.py").write_text(NOTEBOOK)
    return tmp_path


def run(folder: Path, *command: str) -> str:
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), root])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_foreign_program_runs_the_same_with_and_without_our_plugins(foreign: Path) -> None:
    with_plugins = run(foreign, "foreign.py")
    assert with_plugins == run(foreign, "foreign.py", "--without")
    assert with_plugins == "main 2 2000000\nmodule 3\nimported []\n"


def test_foreign_program_finds_our_launcher_and_sweepers(foreign: Path) -> None:
    assert "pool" in run(foreign, "foreign.py", "--info", "plugins").lower()


def test_compose_in_a_notebook_leaves_hydras_own_sources(foreign: Path) -> None:
    assert run(foreign, "notebook.py") == "2\n"
