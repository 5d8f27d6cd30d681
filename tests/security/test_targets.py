"""Every allowed target of the installed libraries is called with hostile arguments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.config.allowlist import LIBRARY_MODULES
from tests.support.walk_targets import MARK
from tests.support.warm import WarmCommand

FEW = (
    *("torch.optim", "torch.nn", "torchmetrics.image", "torchmetrics.wrappers"),
    *("torchvision.transforms", "torchvision.datasets", "torchvision.models.optical_flow", "app."),
)


@pytest.mark.parametrize(
    ("words", "minimum"),
    [(FEW, 300), pytest.param(LIBRARY_MODULES, 600, marks=pytest.mark.long)],
    ids=["few", "all"],
)
def test_allowed_target_with_hostile_arguments_touches_nothing(
    words: tuple[str, ...], minimum: int, tmp_path: Path
) -> None:
    walk = WarmCommand(tmp_path, words, {}, tmp_path / "err", "tests.support.walk_targets")
    out, _ = walk.communicate()
    result = json.loads(out.splitlines()[-1])
    assert result["found"] == {}
    assert sum(result["counts"].values()) >= minimum
    assert not (tmp_path / MARK).exists()
