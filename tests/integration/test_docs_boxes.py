"""The commands of docs/boxes.md, on the pictures that it draws."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.support.runs import config_issues

PAGE = (Path(__file__).parents[2] / "docs" / "boxes.md").read_text()
COMMANDS = [
    command
    for command in re.findall(r"^python -m app (.+)$", PAGE, re.MULTILINE)
    if "ckpt=" not in command  # tests/integration/test_detection.py runs those modes
]


@pytest.mark.usefixtures("tmp_cwd")
def test_docs_boxes_commands_are_valid_for_its_pictures() -> None:
    pytest.importorskip("pycocotools", reason="needs the extra detection")
    (script,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(script.replace("count=200", "count=20"))
    assert len(COMMANDS) == 7
    for command in COMMANDS:
        assert not config_issues(*shlex.split(command)), command
