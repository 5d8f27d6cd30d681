"""Downloads of torchvision's datasets."""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from app.data.torchvision_sets import download_dataset, torchvision_dataset
from app.runtime.errors import UserError


@contextmanager
def http_server(folder: Path) -> Iterator[str]:
    """Serve a folder on localhost; yields the URL."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_download_with_wrong_md5_is_refused(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    (source / "a.gz").write_bytes(b"content")
    md5 = hashlib.md5(b"content").hexdigest()
    with http_server(source) as url:
        download_dataset(target, [url], [("a.gz", md5)])
        assert (target / "a.gz").read_bytes() == b"content"
        with pytest.raises(UserError, match="cannot be downloaded"):
            download_dataset(target / "b", [url], [("a.gz", "0" * 32)])
    files = {path.name for path in target.rglob("*") if path.is_file()}
    assert files == {"a.gz", ".download.lock"}


def test_existing_file_with_wrong_md5_is_refused(tmp_path: Path) -> None:
    raw = tmp_path / "KMNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte.gz").write_bytes(b"wrong")
    with pytest.raises(UserError, match=r"is damaged: its MD5 is not bdb8.*delete it"):
        torchvision_dataset("KMNIST", train=True, root=str(tmp_path))


@pytest.mark.parametrize("name", ["FashionMNIST", "CIFAR10", "CIFAR100", "SVHN"])
def test_offline_error_names_file_md5_and_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "SVHN":
        pytest.importorskip("scipy", reason="SVHN needs the extra svhn")
    monkeypatch.setattr("urllib.request._opener", None)  # it caches proxies
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:1")  # nothing listens there
    with pytest.raises(UserError, match=r"cannot be downloaded.*put .*MD5 .*into") as caught:
        torchvision_dataset(name, train=True, root=str(tmp_path))
    assert str(tmp_path) in str(caught.value)
