"""The how-to page docs/fine-tuning.md works as it is written, on the pictures that it draws."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from app.training.checkpoint.checkpoint import load_checkpoint
from tests.support.runs import RunResult

PAGE = (Path(__file__).parents[2] / "docs" / "fine-tuning.md").read_text()
SHORT = ("trainer.max_epochs=1", "data.loader.num_workers=0")


@pytest.mark.usefixtures("tmp_cwd")
def test_page_fine_tunes_on_other_classes(app: Callable[..., RunResult]) -> None:
    (script,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(script, {})
    commands = re.findall(r"^python -m app (.*)$", PAGE, re.MULTILINE)
    train, check, tune, frozen, distill = map(shlex.split, commands)
    trained = app(*train, *SHORT)
    assert trained.code == 0, trained.err
    checked = app(*check)
    assert (checked.code, checked.out) == (0, "the configuration is valid\n"), checked.err
    for command in (tune, frozen, distill):
        tuned = app(*command, *SHORT)
        assert tuned.code == 0, tuned.err
    table = pd.read_csv("outputs/stars/initial_weights.csv")
    assert table["match"].value_counts().to_dict() == {"taken": 18, "other shape": 2}
    assert "distillation_loss" in pd.read_csv("outputs/small/train_summary_table.csv")
    log = Path("outputs/stars/run.log").read_text()
    lines = re.findall(r"^  other shape.*$", PAGE, re.MULTILINE)
    assert len(lines) == 2
    assert all(line in log for line in lines)
    before, after = (
        load_checkpoint(Path("outputs", name)).model for name in ("polygons", "frozen")
    )
    same = {name: before[name].equal(after[name]) for name in before}
    assert same == {name: name.startswith("features.") for name in before}
