"""Loading checkpoints that are damaged, malicious or of another model."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from app.runtime.errors import UserError
from app.training.checkpoint.checkpoint import load_checkpoint, load_weights
from tests.support.hostile_files import MaliciousPickle, checkpoint_bytes


def test_load_checkpoint_with_code_is_refused_and_not_run(tmp_cwd: Path) -> None:
    (tmp_cwd / "evil.pt").write_bytes(checkpoint_bytes({"format": 1, "model": MaliciousPickle()}))
    with pytest.raises(UserError, match="contains more than tensors and plain values; refused"):
        load_checkpoint(tmp_cwd / "evil.pt")
    (tmp_cwd / "plain.pt").write_bytes(pickle.dumps(MaliciousPickle()))
    with pytest.raises(UserError, match="truncated or not a checkpoint"):
        load_checkpoint(tmp_cwd / "plain.pt")
    assert not (tmp_cwd / "was_here").exists()


@pytest.mark.parametrize("content", [{"model": {}}, [1, 2], {"format": 99}])
def test_load_checkpoint_of_another_program_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match="has no checksum: it is damaged, or was not written by"):
        load_checkpoint(tmp_path / "a.pt")
    (tmp_path / "a.pt").write_bytes(checkpoint_bytes(content))
    with pytest.raises(
        UserError, match=r"is not a checkpoint of this program|this program reads format 3"
    ):
        load_checkpoint(tmp_path / "a.pt")


def test_load_checkpoint_other_zip_file_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a.txt", "text")
    with pytest.raises(UserError, match="has no checksum"):
        load_checkpoint(tmp_path / "a.pt")


def test_load_checkpoint_folder_without_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"contains no checkpoint: no checkpoints/best\.pt or last\.pt"
    ):
        load_checkpoint(tmp_path)


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
