"""Each line of docs/coming-from.md is true: words compose, names import, files are there."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import Ran, mistakes_in

TEXT = (Path(__file__).parents[2] / "docs" / "coming-from.md").read_text()


def lines() -> Iterator[tuple[str, str]]:
    """(theirs, ours) of every line of the tables."""
    for line in TEXT.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| ") and cells[0] not in ("there", "---"):
            assert len(cells) == 2, line
            yield cells[0], cells[1]


def spans() -> list[str]:
    return sorted({span for _, ours in lines() for span in re.findall(r"`([^`]+)`", ours)})


NAMES = [s for s in spans() if re.fullmatch(r"(app|torch|torchmetrics)(\.\w+)+", s)]
FILES = [s for s in spans() if re.search(r"(\.csv|\.pt|\.log|\.yaml|/)$", s) and "=" not in s]
WORDS = [s for s in spans() if s not in NAMES + FILES]
NEEDED = {  # what the classification of the main job lacks, for words that are for other tasks
    "loss=l1": ("data=csv", "data.path=x", "data.num_classes=null", "data.input_shape=[4]"),
    "loss=mse": ("data=csv", "data.path=x", "data.num_classes=null", "data.input_shape=[4]"),
}
REGRESSION = ("model=mlp", "+model.num_classes=1", "metric=regression", "goal.metric=mae")


def test_there_is_a_line_for_every_system() -> None:
    assert len(list(lines())) > 120
    assert len(NAMES) > 35
    assert len(FILES) > 8
    assert len(WORDS) > 60
    assert not [ours for _, ours in lines() if "`" not in ours and "not needed" not in ours]


@pytest.mark.parametrize("name", NAMES)
def test_names_import(name: str) -> None:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return
    raise AssertionError(name)


@pytest.mark.parametrize("file", FILES)
def test_files_are_there(trained: Ran, file: str) -> None:
    root = trained.cwd if file == "outputs/" else trained.folder
    assert (root / file.replace("epoch001_test", "epoch002_test")).exists()


@pytest.mark.parametrize("words", WORDS)
def test_words_compose(words: str, trained: Ran) -> None:
    typed = shlex.split(words.replace("RUN", str(trained.folder)))
    if words.startswith("--"):
        return  # tests/test_floors.py shows configurations
    needed = (*NEEDED[words], *REGRESSION) if words in NEEDED else ()
    assert not mistakes_in(*typed, *needed)
