"""Files of `torch.save` by strangers give tensors or one line of error, and run no code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from app.runtime.errors import UserError
from app.training.checkpoint import torch_file
from app.training.checkpoint.torch_file import read_torch_file
from tests.support.hostile_files import MaliciousPickle

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3).t(), "a.count": torch.tensor(3)}


def save(path: Path, content: Any, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def error_of(file: Path) -> str:
    with pytest.raises(UserError) as error:
        read_torch_file(file)
    message = str(error.value)
    assert message.startswith(f"{file} cannot be read: ")
    assert message.isprintable()
    assert len(message) < 600
    return message


@pytest.mark.parametrize("zipped", [True, False])
def test_read_torch_file_returns_the_same_tensors(tmp_path: Path, zipped: bool) -> None:
    file = save(tmp_path / "w.pt", {"state_dict": STATE, "epoch": 3}, zipped)
    read = read_torch_file(file)
    assert read.keys() == STATE.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in STATE.items())


def test_read_torch_file_with_code_is_refused_and_nothing_runs(
    tmp_cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    file = save(tmp_cwd / "w.pt", {"state_dict": STATE, "bad": MaliciousPickle()})
    assert "it contains objects (posix.system), which could run code; save the" in error_of(file)
    assert not (tmp_cwd / "was_here").exists()


def test_read_torch_file_that_grows_is_refused_within_its_memory(tmp_path: Path) -> None:
    content = {"a": torch.zeros(1).expand(2**14, 2**15)}  # 2 GiB, of 4 bytes in the file
    file = save(tmp_path / "w.pt", content)
    assert "its content takes much more memory than the file has bytes" in error_of(file)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content.replace(b"ctorch", b"cxorch"),
    ],
)
def test_read_torch_file_that_is_damaged_gives_one_line(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    file = save(tmp_path / "w.pt", STATE)
    file.write_bytes(damage(file.read_bytes()))
    error_of(file)


def test_read_torch_file_that_takes_too_long_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_file, "MIN_SECONDS", 0)
    assert "it took more than 0 seconds" in error_of(save(tmp_path / "w.pt", STATE))
