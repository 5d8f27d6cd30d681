"""Files of published weights for tests: tensors of ours, under a name that has their hash."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty folder of torch.hub's weights; nothing can be downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    forbid_downloads(monkeypatch)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def forbid_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Route the network to an address where nothing listens."""
    monkeypatch.setattr("urllib.request._opener", None)  # it caches proxies
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:1")


def random_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of the same names, shapes and types with other values."""
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.rand(tensor.shape, generator=generator).to(tensor.dtype)
        for name, tensor in tensors.items()
    }


def save_with_hash(content: object, folder: Path, stem: str) -> Path:
    """Write a file with `torch.save`, named as torch.hub names it after its SHA-256."""
    file = folder / f"{stem}.pth"
    torch.save(content, file)
    return file.rename(folder / f"{stem}-{sha256_of(file)[:8]}.pth")


def sha256_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
