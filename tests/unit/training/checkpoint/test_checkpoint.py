"""Loading checkpoints that are missing or of another model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from app.runtime.errors import UserError
from app.training.checkpoint.checkpoint import load_checkpoint, load_weights


def test_load_checkpoint_folder_without_checkpoint_is_refused(tmp_path: Path) -> None:
    message = r"contains no checkpoint: no checkpoints/best\.safetensors or last\.safetensors"
    with pytest.raises(UserError, match=message):
        load_checkpoint(tmp_path)


def test_load_checkpoint_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="contains no checkpoint"):
        load_checkpoint(tmp_path / "missing.safetensors")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"weight": torch.zeros(2, 3)}, "it has no 'bias'"),
        ({"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}, r"'weight' has shape \[2, 4\]"),
        (
            {"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "more": torch.zeros(1)},
            "the model has no more",
        ),
    ],
)
def test_load_weights_of_another_architecture_names_the_difference(
    state: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(UserError, match=f"a.pt comes from another architecture: {message}"):
        load_weights(nn.Linear(3, 2), state, "a.pt")
