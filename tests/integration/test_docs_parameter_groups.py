"""The commands of docs/parameter_groups.md."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from app.config.optimizers import GROUP_OPTIONS, OPTIONS
from app.experiment.run import check_samples
from tests.support.runs import config_issues, job_for

PAGE = (Path(__file__).parents[2] / "docs" / "parameter_groups.md").read_text()


def test_docs_parameter_groups_commands_fit_their_models() -> None:
    commands = re.findall(r"^python -m app (.+)$", PAGE, re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        check_samples(job_for(*shlex.split(command)))


def test_docs_parameter_groups_overrides_have_no_config_errors() -> None:
    words = re.findall(r"`((?:optimizer|scheduler|trainer)[.=][^`]+)`", PAGE)
    overrides = [word for word in words if "=" in word]
    assert len(overrides) >= 10
    for override in overrides:
        if override != "scheduler=lambda":
            assert not config_issues("scheduler.warmup_steps=0", *override.split()), override


def test_docs_parameter_groups_name_every_option() -> None:
    for name in (*OPTIONS, *GROUP_OPTIONS):
        assert name in PAGE, name
