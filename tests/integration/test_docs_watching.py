"""The pages docs/watching.md and docs/long_epochs.md are true."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pandas as pd
import pytest

from tests.support.runs import config_issues, run_app

DOCS = Path(__file__).parents[2] / "docs"
WATCHING, LONG_EPOCHS = ((DOCS / name).read_text() for name in ("watching.md", "long_epochs.md"))
FAST = ("callbacks.plots=null", "callbacks.batch_images=null")


def commands(page: str) -> list[list[str]]:
    """Return the overrides of each command of a page."""
    lines = re.findall(r"^python -m app (.*)$", page, re.MULTILINE)
    texts = (re.split(r" +(?:#|2>)", line)[0] for line in lines)
    return [shlex.split(text) for text in texts]


@pytest.mark.parametrize("page", [WATCHING, LONG_EPOCHS])
def test_commands_have_no_mistake(page: str) -> None:
    assert len(commands(page)) >= 2
    for overrides in commands(page):
        own = any("my_callbacks" in override for override in overrides)
        assert own or not config_issues(*overrides)


def test_callback_of_the_page_ends_the_training(tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", WATCHING, re.DOTALL)
    (tmp_path / "my_callbacks.py").write_text(block)
    (overrides,) = [line for line in commands(WATCHING) if "my_callbacks" in " ".join(line)]
    result = run_app(
        tmp_path,
        *overrides,
        *FAST,
        "callbacks.stop.loss=100",
        "trainer.max_epochs=50",
        "trainer.log_every_n_steps=1",
        "trainer.log_every=0.2",
        "trainer.limit_valid_batches=2",
        "trainer.limit_test_batches=2",
        "hydra.run.dir=run",
    )
    assert result.code == 0, result.err
    assert re.search(r"stopped after epoch \d+: the loss is below 100", result.out)
    assert "epoch 1/50 train: " in result.out
    assert len(pd.read_csv(tmp_path / "run" / "test_summary_table.csv")) == 1


def test_validation_by_steps_gives_the_rows_of_the_page(tmp_path: Path) -> None:
    overrides = commands(LONG_EPOCHS)[1]
    limits = ("trainer.limit_valid_batches=2", "trainer.limit_test_batches=2")
    result = run_app(tmp_path, *overrides, *FAST, *limits, "hydra.run.dir=run")
    assert result.code == 0, result.err
    table = pd.read_csv(tmp_path / "run" / "summary_table.csv")
    for stage in ("train", "valid"):
        assert table[table["stage"] == stage]["step"].tolist() == [50, 100, 150, 200]
    header = "epoch  step stage  loss_mean  total_samples  accuracy"
    assert header in LONG_EPOCHS
    assert set(header.split()) <= set(table.columns)
    names = {path.name for path in (tmp_path / "run" / "epoch_details").iterdir()}
    assert "epoch001_step000050_train.csv" in names
