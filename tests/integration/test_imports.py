"""What the command line imports when it starts."""

from __future__ import annotations

import subprocess
import sys

import pytest

PRINT_HEAVY = "print([n for n in ('torch', 'pandas', 'numpy', 'pydantic') if n in sys.modules])"


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "module", ["app", "app.cli.main", "app.distributed.launch.select", "app.config.validate"]
)
def test_import_of_command_line_and_configuration_is_light(module: str) -> None:
    assert run_python(f"import sys, {module}; {PRINT_HEAVY}").strip() == "[]"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--cfg", "job"], ["--hydra-help"], ["--info", "searchpath"]]
)
def test_command_that_only_prints_is_light(arguments: list[str]) -> None:
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
    assert run_python(code).splitlines()[-1] == "[]"


@pytest.mark.parametrize("override", ["data=nope", "modle=lenet", "trainer.max_epochs=-1"])
def test_command_with_a_wrong_override_imports_no_component(override: str) -> None:
    code = f"""
import sys
sys.argv = ["app", {override!r}]
from app.cli.main import main
try:
    main()
except SystemExit as end:
    assert end.code == 2, end.code
print([name for name in ("torch", "torchvision", "torchmetrics") if name in sys.modules])
"""
    assert run_python(code).splitlines()[-1] == "[]"
