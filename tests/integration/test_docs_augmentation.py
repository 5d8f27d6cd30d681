"""The commands of docs/augmentation.md."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from tests.support.runs import config_issues, job_for

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "augmentation.md").read_text()


def test_docs_augmentation_commands_have_no_config_errors() -> None:
    commands = re.findall(r"^python -m app (?!-m)(.+)$", PAGE, re.MULTILINE)
    assert len(commands) >= 7
    for command in commands:
        assert not config_issues(*shlex.split(command, comments=True)), command


def test_docs_augmentation_none_comes_first() -> None:
    augment = job_for("data=cifar10", "data/augment=[none,randaugment]").config.data.augment
    assert [name for name, node in augment.items() if node] == ["randaugment"]


def test_docs_augmentation_lists_every_option() -> None:
    listed = re.findall(r"^\| `([a-z]+)` \|", PAGE, re.MULTILINE)
    files = (ROOT / "conf" / "data" / "augment").glob("*.yaml")
    assert sorted(listed) == sorted(file.stem for file in files)
