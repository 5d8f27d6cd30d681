"""Each row of docs/coming-from.md is true: overrides compose, names import, files exist."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.data_files import write_data
from tests.support.runs import RunResult, config_issues

TEXT = (Path(__file__).parents[2] / "docs" / "coming-from.md").read_text().split("## Habits")[0]


def rows() -> Iterator[tuple[str, str]]:
    """Yield (theirs, ours) of every table row."""
    for line in TEXT.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| ") and cells[0] not in ("there", "---"):
            assert len(cells) == 2, line
            yield cells[0], cells[1]


def code_spans() -> list[str]:
    return sorted({span for _, ours in rows() for span in re.findall(r"`([^`]+)`", ours)})


NAMES = [s for s in code_spans() if re.fullmatch(r"(app|torch|torchmetrics)(\.\w+)+", s)]
FILES = [
    s
    for s in code_spans()
    if re.search(r"(\.csv|\.pt|\.safetensors|\.log|\.yaml|/)$", s) and "=" not in s
]
OVERRIDES = [s for s in code_spans() if s not in NAMES + FILES]
EXTRA_OVERRIDES = {  # rows about regression do not compose with the default classification data
    "loss=l1": ("data=csv", "data.path=x.csv", "data.num_classes=null"),
    "loss=mse": ("data=csv", "data.path=x.csv", "data.num_classes=null"),
}
REGRESSION = ("model=mlp", "+model.num_classes=1", "metric=regression", "goal.metric=mae")


def test_coming_from_tables_have_rows_of_every_kind() -> None:
    assert len(list(rows())) > 120
    assert len(NAMES) > 35
    assert len(FILES) > 8
    assert len(OVERRIDES) > 60
    assert not [ours for _, ours in rows() if "`" not in ours and "not needed" not in ours]


@pytest.mark.parametrize("name", NAMES)
def test_coming_from_name_is_importable(name: str) -> None:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            value = getattr(value, part)
        return
    raise AssertionError(name)


@pytest.mark.parametrize("file", FILES)
def test_coming_from_file_exists_in_run_folder(trained_run: RunResult, file: str) -> None:
    root = trained_run.cwd if file == "outputs/" else trained_run.folder
    tested_epoch = trained_run.csv("test_summary_table.csv")["epoch"].iloc[0]
    assert (root / file.replace("epoch001_test", f"epoch00{tested_epoch}_test")).exists()


@pytest.mark.parametrize("overrides", OVERRIDES)
def test_coming_from_overrides_have_no_config_errors(
    overrides: str, trained_run: RunResult, tmp_cwd: Path
) -> None:
    write_data("csv", tmp_cwd)
    arguments = shlex.split(overrides.replace("RUN", str(trained_run.folder)))
    if overrides.startswith("--"):
        return  # prints the configuration; see test_imports.py
    extra = (*EXTRA_OVERRIDES[overrides], *REGRESSION) if overrides in EXTRA_OVERRIDES else ()
    assert not config_issues(*arguments, *extra)
