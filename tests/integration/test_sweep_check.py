"""The commands of sweeps in README and docs are valid."""

from __future__ import annotations

import re
import shlex
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.sweeps import sweep_errors

ROOT = Path(__file__).parents[2]
BASH = re.compile(r"```bash\n(.*?)```", re.DOTALL)


def documented_sweeps() -> list[str]:
    """Return the sweep commands in README.md and docs/sweeps.md."""
    pages = [(ROOT / name).read_text() for name in ("README.md", "docs/sweeps.md")]
    blocks = [block for page in pages for block in BASH.findall(page)]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith("python -m app -m") and "resume" not in line]


@pytest.mark.parametrize("command", documented_sweeps())
def test_documented_sweep_command_is_valid(command: str) -> None:
    assert subprocess.run(["bash", "-nc", command]).returncode == 0
    arguments = shlex.split(command, comments=True)
    if "hydra/launcher=ray" in arguments and find_spec("hydra_plugins.hydra_ray_launcher") is None:
        pytest.skip("Ray is not installed")
    assert sweep_errors(*arguments[4:]) == ""
