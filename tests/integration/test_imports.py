"""The command line starts without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "module", ["app", "app.cli.main", "app.distributed.launch.select", "app.config.validate"]
)
def test_top_and_bottom_floor_do_not_import_torch(module: str) -> None:
    assert python(f"import sys, {module}; print('torch' in sys.modules)").strip() == "False"


@pytest.mark.parametrize(
    "words", [["--help"], ["--cfg", "job"], ["--hydra-help"], ["--info", "searchpath"]]
)
def test_what_only_shows_does_not_import_torch(words: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["app", *{words!r}]
from app.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("torch" in sys.modules)
"""
    assert python(code).splitlines()[-1] == "False"
