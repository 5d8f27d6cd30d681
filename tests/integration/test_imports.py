"""What the command line imports when it starts."""

from __future__ import annotations

import subprocess
import sys

import pytest

PRINT_HEAVY = "print({'torch', 'pydantic'} & {*sys.modules})"


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "module", ["app", "app.cli.main", "app.distributed.launch.select", "app.config.validate"]
)
def test_import_of_command_line_and_configuration_does_not_import_torch(module: str) -> None:
    assert run_python(f"import sys, {module}; {PRINT_HEAVY}").strip() == "set()"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--cfg", "job"], ["--hydra-help"], ["--info", "searchpath"]]
)
def test_command_that_only_prints_does_not_import_torch(arguments: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["app", *{arguments!r}]
from app.cli.main import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
{PRINT_HEAVY}
"""
    assert run_python(code).splitlines()[-1] == "set()"
