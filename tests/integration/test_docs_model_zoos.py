"""The commands and counts of docs/model_zoos.md."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from torchvision import models

from tests.support.image_files import write_image_folder
from tests.support.runs import config_issues

PAGE = (Path(__file__).parents[2] / "docs" / "model_zoos.md").read_text()
COMMANDS = re.findall(r"^(?:\$ )?python -m app (.+)$", PAGE, re.MULTILINE)


def test_docs_model_zoos_commands_do_what_the_page_says(tmp_cwd: Path) -> None:
    pytest.importorskip("timm", reason="needs the extra timm")
    pytest.importorskip("segmentation_models_pytorch", reason="needs the extra smp")
    write_image_folder(tmp_cwd / "pets", {"cat": 20, "dog": 20})
    assert len(COMMANDS) == 7
    for command in COMMANDS:
        issues = config_issues(*shlex.split(command))
        found = re.sub(r"[\d,]+ names", "3,197 names", "\n".join(issues))
        assert all(issue in PAGE for issue in found.splitlines()), command
        assert bool(issues) == ("resnt18" in command)


def test_docs_model_zoos_counts_names() -> None:
    listed = re.findall(r"(\d+) names for .*, (\d+) for segmentation, (\d+) for detection", PAGE)
    counts = [len(models.list_models(module=m)) for m in (models, models.segmentation)]
    detectors = models.list_models(module=models.detection)
    counts.append(sum(not name.startswith(("mask", "keypoint")) for name in detectors))
    assert listed == [tuple(map(str, counts))]


def test_docs_model_zoos_values_of_the_weights_compose() -> None:
    rows = re.findall(r"^\| `(data\.[\w.]+)`.* \| `'(\$\{.*\})'` \|$", PAGE, re.MULTILINE)
    assert len(rows) == 4
    assert not config_issues("model=torchvision", "data=cifar10", *map("=".join, rows))
