"""Checksums of checkpoint files."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from app.runtime.errors import UserError
from app.training.checkpoint.checksum import (
    CheckpointInfo,
    verify_checksum,
    write_with_checksum,
)


def test_verify_checksum_detects_any_changed_byte_and_truncation(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with path.open("wb") as file:
        write_with_checksum(
            file, "a.pt", CheckpointInfo("state", 3, 7), lambda f: torch.save({"a": 1}, f)
        )
    assert verify_checksum(path) == CheckpointInfo("state", 3, 7)
    content = path.read_bytes()
    assert torch.load(path, weights_only=True) == {"a": 1}
    for index in range(len(content)):
        path.write_bytes(content[:index] + bytes([content[index] ^ 4]) + content[index + 1 :])
        with pytest.raises(UserError):
            verify_checksum(path)
    for length in random.Random(0).sample(range(len(content)), 200):
        path.write_bytes(content[:length])
        with pytest.raises(UserError):
            verify_checksum(path)
