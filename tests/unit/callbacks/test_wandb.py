"""The Weights & Biases callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from app.callbacks.wandb import WeightsAndBiases
from app.runtime.errors import UserError


def test_wandb_with_unknown_mode_raises(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="mode='off'; allowed: offline, online"):
        WeightsAndBiases(tmp_path, config, mode="off")  # type: ignore[arg-type]
