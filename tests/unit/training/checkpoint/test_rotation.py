"""Rotation of training checkpoints."""

from __future__ import annotations

from pathlib import Path

from app.training.checkpoint.header import CheckpointInfo, verify_checksum
from app.training.checkpoint.rotation import CheckpointRotation, list_checkpoints
from app.training.checkpoint.store import write_store
from tests.support.hostile_files import flip_bit


def test_write_keeps_resumed_checkpoint_until_enough_newer_ones(tmp_path: Path) -> None:
    def save(rotation: CheckpointRotation, number: int) -> None:
        info = CheckpointInfo("state", 1, number)
        rotation.write(lambda file: write_store(file, "", info, {"number": number}))

    first = CheckpointRotation(tmp_path, keep=3)
    for number in (1, 2, 3):
        save(first, number)
    flip_bit(tmp_path / "checkpoints" / "last.safetensors")
    resumed = CheckpointRotation(tmp_path, keep=3)
    resumed.resume_from(tmp_path / "checkpoints" / "last-1.safetensors")
    save(resumed, 3)
    assert [verify_checksum(path).number for path in list_checkpoints(tmp_path)] == [3, 2, 1]
    fewer = CheckpointRotation(tmp_path, keep=2)
    fewer.resume_from(tmp_path / "checkpoints" / "last.safetensors")
    save(fewer, 4)
    assert [verify_checksum(path).number for path in list_checkpoints(tmp_path)] == [4, 3]
    link = tmp_path / "link"
    link.symlink_to(tmp_path, target_is_directory=True)  # another path to the same file
    fewer.resume_from(link / "checkpoints" / "last-1.safetensors")
    save(fewer, 5)
    assert [verify_checksum(path).number for path in list_checkpoints(tmp_path)] == [5, 3]
