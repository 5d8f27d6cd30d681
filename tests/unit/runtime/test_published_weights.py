"""Published weights: only files of a known hash, read without running code."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from app.runtime.errors import UserError
from app.runtime.published_weights import PublishedWeights
from tests.support.hostile_files import MaliciousPickle
from tests.support.published_weights import hub_folder, save_with_hash, sha256_of

__all__ = ["hub_folder"]
WEIGHTS = {"weight": torch.arange(4.0)}
NO_URL = "http://127.0.0.1:1"


def test_load_missing_file_downloads_it_once(hub_folder: Path, tmp_path: Path) -> None:
    source = save_with_hash(WEIGHTS, tmp_path, "net")
    published = PublishedWeights(source.as_uri(), source.name)
    assert torch.equal(published.load()["weight"], WEIGHTS["weight"])
    source.unlink()
    assert torch.equal(published.load()["weight"], WEIGHTS["weight"])
    assert (hub_folder / source.name).is_file()


def test_load_download_with_wrong_hash_is_not_kept(hub_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "net-0123abcd.pth"
    torch.save(WEIGHTS, source)
    with pytest.raises(UserError, match=r"cannot be downloaded .invalid hash value") as caught:
        PublishedWeights(source.as_uri(), source.name).load()
    assert "\n" not in str(caught.value)
    assert not [path for path in hub_folder.iterdir() if not path.name.endswith(".lock")]


def test_load_without_network_says_what_to_put_where(hub_folder: Path) -> None:
    with pytest.raises(UserError, match="cannot be downloaded") as caught:
        PublishedWeights(f"{NO_URL}/a/model.safetensors", "net.safetensors").load("0" * 64)
    message = str(caught.value)
    assert f"put {NO_URL}/a/model.safetensors into {hub_folder} as net.safetensors" in message
    assert "\n" not in message


@pytest.mark.parametrize("content", [b"", b"text", pickle.dumps(MaliciousPickle())])
def test_load_file_with_wrong_hash_is_not_read(
    content: bytes, hub_folder: Path, tmp_cwd: Path
) -> None:
    (hub_folder / "net-0123abcd.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"net-0123abcd\.pth is damaged or a different file: its"):
        PublishedWeights(f"{NO_URL}/net-0123abcd.pth", "net-0123abcd.pth").load()
    assert not (tmp_cwd / "was_here").exists()


def test_load_pickle_with_right_hash_runs_no_code(hub_folder: Path, tmp_cwd: Path) -> None:
    file = save_with_hash(MaliciousPickle(), hub_folder, "net")
    with pytest.raises(UserError, match="does not contain plain weights"):
        PublishedWeights(NO_URL, file.name).load()
    assert not (tmp_cwd / "was_here").exists()


@pytest.mark.parametrize("content", [[1.0], {}])
def test_load_file_without_tensors_by_name_raises(content: object, hub_folder: Path) -> None:
    file = save_with_hash(content, hub_folder, "net")
    with pytest.raises(UserError, match="does not contain weights by name"):
        PublishedWeights(NO_URL, file.name).load()


def test_load_safetensors_needs_full_sha256(hub_folder: Path) -> None:
    file = hub_folder / "net.safetensors"
    save_file(WEIGHTS, file)
    published = PublishedWeights(f"{NO_URL}/a/model.safetensors", file.name)
    sha256 = sha256_of(file)
    assert torch.equal(published.load(sha256.upper())["weight"], WEIGHTS["weight"])
    with pytest.raises(UserError, match=r"sha256=null: .*model\.safetensors is read only if"):
        published.load()
    with pytest.raises(UserError, match="allowed: 64 hexadecimal digits"):
        published.load(sha256[:8])
    with pytest.raises(UserError, match="is damaged or a different file"):
        published.load("0" * 64)
    file.write_bytes(b"text")
    with pytest.raises(UserError, match="does not contain plain weights"):
        published.load(sha256_of(file))
