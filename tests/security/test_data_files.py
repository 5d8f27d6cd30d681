"""Files from untrusted sources: archives, arrays, images, downloads, and exported tables."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import multiprocessing as mp
import os
import pickle
import subprocess
import tarfile
import threading
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision.datasets as datasets
from PIL import EpsImagePlugin, Image
from torchvision.datasets import ImageFolder

from app.data.archives import unpack
from app.data.arrays import csv, npz
from app.data.cached import cached
from app.data.hugging_face import hugging_face
from app.data.idx import read_idx
from app.data.images import ImageFiles, decode_image, image_folder, without_ghostscript
from app.data.torchvision_sets import download_dataset, torchvision_dataset
from app.models.pretrained import pretrained
from app.runtime.errors import UserError
from app.runtime.files import write_csv
from app.runtime.published_weights import PublishedWeights
from tests.support.hostile_files import MaliciousPickle
from tests.support.published_weights import save_with_hash


def md5_of(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


# ---- archives


def write_tar(path: Path, *members: tarfile.TarInfo | str) -> Path:
    """Write an archive with the given members; a string is the name of a small file."""
    with tarfile.open(path, "w:gz") as tar:
        for member in members:
            if isinstance(member, str):
                member = tarfile.TarInfo(member)
                member.size = 3
                tar.addfile(member, io.BytesIO(b"abc"))
            else:
                tar.addfile(member, io.BytesIO(b"\0" * member.size) if member.isfile() else None)
    return path


def make_member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> Any:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (["../evil", "in/a"], "would be written outside the folder"),
        (["/tmp/evil", "in/a"], "would be written outside the folder"),
        (["in/../../evil", "in/a"], "would be written outside the folder"),
        ([make_member("in/a", tarfile.SYMTYPE, "/etc/passwd")], "is a link or a device"),
        ([make_member("in", tarfile.SYMTYPE, "/tmp"), "in/a"], "is a link or a device"),
        ([make_member("in/a", tarfile.LNKTYPE, "../x")], "is a link or a device"),
        ([make_member("in/a", tarfile.FIFOTYPE)], "is a link or a device"),
        ([make_member("in/a", size=2_000_000)], "has 2,000,000 bytes; refused"),
        (["in/b"], r"is incomplete \(no in/a\)"),
    ],
)
def test_unpack_refuses_malicious_archive(tmp_path: Path, members: list[Any], message: str) -> None:
    archive = write_tar(tmp_path / "a.tar.gz", *members)
    (tmp_path / "target").mkdir()
    with pytest.raises(UserError, match=message):
        unpack(archive, tmp_path / "target", ["in/a"], max_bytes=1_000_000)
    assert [path for path in (tmp_path / "target").rglob("*") if path.is_file()] == []
    assert not (tmp_path / "evil").exists()


def test_unpack_extracts_only_named_files(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "a.tar.gz", "in/a", "in/more")
    unpack(archive, tmp_path / "target", ["in/a"], max_bytes=3)
    assert [path.name for path in (tmp_path / "target").rglob("*") if path.is_file()] == ["a"]
    archive.write_bytes(archive.read_bytes()[:60])
    with pytest.raises(UserError, match="is damaged"):
        unpack(archive, tmp_path / "target", ["in/a"], max_bytes=3)


def test_unpack_does_not_follow_links_in_target_folder(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "a.tar.gz", "in/a")
    outside, target = tmp_path / "outside", tmp_path / "target"
    outside.mkdir()
    target.mkdir()
    (target / "in").symlink_to(outside)
    with pytest.raises(UserError, match="is a link that points outside"):
        unpack(archive, target, ["in/a"], max_bytes=3)
    assert list(outside.iterdir()) == []


def write_npz_of_zeros(path: Path, megabytes: int) -> Path:
    """Write a small `.npz` file with two arrays of the given size."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("x", "y"):
            header = io.BytesIO()
            shape = {"descr": "|u1", "fortran_order": False, "shape": (megabytes * 2**20,)}
            np.lib.format.write_array_header_1_0(header, shape)
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                file.write(header.getvalue())
                for _ in range(megabytes):
                    file.write(bytes(2**20))
    return path


@pytest.mark.parametrize("read", [lambda p: npz(p, "x", "y"), lambda p: cached([(1, 2)], p)])
def test_npz_bomb_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[str], object]
) -> None:
    # Lowered, because a file above the real limit takes a minute to write.
    monkeypatch.setattr("app.data.archives.MAX_UNCHECKED_BYTES", 2**22)
    path = write_npz_of_zeros(tmp_path / "a.npz", 10)
    with pytest.raises(UserError, match=r"bytes would expand to 20,97.*; refused"):
        read(str(path))


@pytest.mark.parametrize("shape", [(10**15,), (10**9, 10**9), (2**62, 4), (-1,), (10**5,)])
def test_npz_with_wrong_array_size_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for name in ("x", "y"):
            header = io.BytesIO()
            content = {"descr": "<f8", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(header, content)
            archive.writestr(f"{name}.npy", header.getvalue() + bytes(64))
    with pytest.raises(UserError, match=r"a\.npz: 'x\.npy' declares .*; refused"):
        npz(str(tmp_path / "a.npz"), "x", "y")


def test_npz_objects_are_not_unpickled(tmp_cwd: Path) -> None:
    np.savez("a.npz", x=np.array([MaliciousPickle()], dtype=object), y=np.zeros(1))
    with pytest.raises(UserError, match="unpickled"):
        npz("a.npz", "x", "y")
    assert not (tmp_cwd / "was_here").exists()


def test_gzip_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Lowered, because a file above the real limit takes a minute to write.
    monkeypatch.setattr("app.data.idx.MAX_BYTES", 10_000_000)
    (tmp_path / "a.gz").write_bytes(gzip.compress(bytes(30_000_000)))
    with pytest.raises(UserError, match="would expand to more than 10,000,000 bytes; refused"):
        read_idx(tmp_path / "a.gz")


def write_compressed(path: Path, content: bytes) -> None:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.csv", content)
    else:
        compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
        path.write_bytes(compress[path.suffix](content))


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zip"])
def test_compressed_table_that_expands_too_far_is_refused_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    path = tmp_path / f"a.csv{suffix}"
    write_compressed(path, b"a,label\n1,0\n2,1\n")
    assert csv(str(path), "label").tensors[0].tolist() == [[1.0], [2.0]]
    # Lowered, because a file above the real limit takes a minute to write.
    monkeypatch.setattr("app.data.archives.MAX_UNCHECKED_BYTES", 2**22)
    write_compressed(path, b"a,label\n" + b"0,0\n" * 5_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"bytes expand to more than [\d,]+; refused"):
            csv(str(path), "label")
        assert tracemalloc.get_traced_memory()[1] < 2**24  # of 20 MB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv.gz", b"no gzip", r"a\.csv\.gz is damaged: Not a gzipped file"),
        (
            "a.csv.gz",
            gzip.compress(b"a,label\n1,0\n" * 999, mtime=0)[:40],
            r"a\.csv\.gz is damaged",
        ),
        ("a.csv.xz", b"no xz", r"a\.csv\.xz is damaged"),
        ("a.csv.zip", b"no zip", r"a\.csv\.zip is damaged"),
        ("a.csv.zst", b"", r"a\.csv\.zst: .*allowed: \.bz2, \.gz, \.xz, \.zip"),
    ],
)
def test_damaged_compressed_table_is_one_error(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        csv(str(tmp_path / name), "label")


# ---- images


@pytest.fixture
def ghostscript_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that exists once a program named `gs` has been started."""
    mark, program = tmp_path / "started", tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch '{mark}'\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow searches for it only once
    return mark


def write_eps(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["%!PS-Adobe-3.0 EPSF-3.0", "%%BoundingBox: 0 0 8 8", "%%EndComments", "showpage"]
    path.write_text("\n".join([*lines, "%%EOF", ""]))


def test_eps_named_png_is_refused_without_starting_ghostscript(
    tmp_path: Path, ghostscript_mark: Path
) -> None:
    for name in ("cat", "dog"):
        write_eps(tmp_path / "pets" / name / "a.png")
    message = "its format is EPS; allowed: BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP"
    for dataset in (
        image_folder(str(tmp_path / "pets")),
        ImageFiles(str(tmp_path / "pets"), None, 3),
    ):
        with pytest.raises(UserError, match=rf"a\.png cannot be read as an image: {message}"):
            dataset[0]
    foreign = ImageFolder(str(tmp_path / "pets"))  # opens whatever Pillow recognizes
    with without_ghostscript(), pytest.raises(OSError, match="Ghostscript"):
        foreign[0]
    assert not ghostscript_mark.exists()
    with pytest.raises(subprocess.CalledProcessError):
        foreign[0]
    assert ghostscript_mark.exists(), "the test must be able to start it"


@pytest.mark.parametrize("as_bytes", [True, False])
def test_hugging_face_eps_is_refused_without_starting_ghostscript(
    tmp_path: Path, ghostscript_mark: Path, as_bytes: bool
) -> None:
    library = pytest.importorskip("datasets", reason="needs the extra hugging_face")
    write_eps(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes() if as_bytes else None
    cell = {"bytes": content, "path": str(tmp_path / "a.png")}
    one, several = library.Image(), library.List(library.Image())
    features = library.Features({"image": one, "label": library.Value("int64"), "all": several})
    rows = {"image": [cell], "label": [0], "all": [[cell]]}
    library.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "rows"))
    with pytest.raises(UserError, match=r"sample 0, column 'image' .*its format is EPS; allowed: "):
        hugging_face(str(tmp_path / "rows"), "train")[0]
    with pytest.raises(UserError, match=r"column 'all' is of type .*; allowed: images, numbers"):
        hugging_face(str(tmp_path / "rows"), "train", inputs="all")
    assert not ghostscript_mark.exists()


def test_image_folder_refuses_external_and_cyclic_links(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in" / "cat", tmp_path / "out"
    inside.mkdir(parents=True)
    outside.mkdir()
    for folder in (inside, outside):
        Image.new("RGB", (2, 2)).save(folder / "a.png")
    (inside / "again.png").symlink_to(inside / "a.png")
    assert len(image_folder(str(tmp_path / "in"), ["cat"])) == 2
    (inside / "b.png").symlink_to(outside / "a.png")
    with pytest.raises(
        UserError, match=r"b\.png is a link to .*, outside the folder.*follow_links=true"
    ):
        image_folder(str(tmp_path / "in"), ["cat"])
    assert len(image_folder(str(tmp_path / "in"), ["cat"], follow_links=True)) == 3
    (inside / "b.png").unlink()
    (inside / "loop").symlink_to(tmp_path / "in")
    with pytest.raises(UserError, match=r"loop is a link back to"):
        image_folder(str(tmp_path / "in"), ["cat"], follow_links=True)


def test_image_bomb_is_refused(tmp_path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png cannot be read as an image.*exceeds limit"):
        decode_image(str(tmp_path / "a.png"))


# ---- downloads


@contextmanager
def file_server(
    content: bytes, num_truncated: int = 0, wait_for: threading.Event | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Serve one file on localhost; yields the URL and the list of requested paths.

    The first `num_truncated` responses are cut off; all responses are delayed until one second
    after the event.
    """
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            if wait_for is not None:
                wait_for.wait(200)
                time.sleep(1)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            truncated = len(requests) <= num_truncated
            self.wfile.write(content[: len(content) // 2] if truncated else content)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/", requests
        server.shutdown()


def file_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_interrupted_download_is_completed_by_next_start(tmp_path: Path) -> None:
    content = os.urandom(200_000)
    with file_server(content, num_truncated=2) as (url, _):  # a download sends two requests
        with pytest.raises(UserError, match=r"a\.gz cannot be downloaded"):
            download_dataset(tmp_path, [url], [("a.gz", md5_of(content))])
        assert file_names(tmp_path) == []
        (tmp_path / "a.gz.part").write_bytes(content[:1000])  # left by a killed process
        download_dataset(tmp_path, [url], [("a.gz", md5_of(content))])
    assert (tmp_path / "a.gz").read_bytes() == content
    assert file_names(tmp_path) == ["a.gz"]


def test_download_with_wrong_hash_is_deleted(tmp_path: Path) -> None:
    with (
        file_server(b"evil") as (url, _),
        pytest.raises(UserError, match=r"a\.gz cannot .*MD5 0000"),
    ):
        download_dataset(tmp_path, [url], [("a.gz", "0" * 32)])
    assert file_names(tmp_path) == []


def download(folder: Path, url: str, md5: str, results: Any) -> None:
    results.put("started")
    download_dataset(folder, [url], [("a.gz", md5)])
    results.put((folder / "a.gz").stat().st_size)


def test_concurrent_processes_download_only_once(tmp_path: Path) -> None:
    content, both_started = os.urandom(3_000_000), threading.Event()
    with file_server(content, wait_for=both_started) as (url, requests):
        context = mp.get_context("spawn")
        results = context.Queue()
        arguments = (tmp_path, url, md5_of(content), results)
        processes = [context.Process(target=download, args=arguments) for _ in range(2)]
        for process in processes:
            process.start()
        assert [results.get(timeout=200) for _ in processes] == ["started"] * 2
        both_started.set()
        assert [results.get(timeout=200) for _ in processes] == [len(content)] * 2
        for process in processes:
            process.join()
    assert len(requests) == 2, "one to resolve redirects, one for the file"


@pytest.fixture
def small_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Archive of a CIFAR10 with two images, whose MD5s torchvision is patched to expect."""
    batch = pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]})
    meta = pickle.dumps({"label_names": ["a", "b"]})
    base = datasets.CIFAR10.base_folder
    content = {"data_batch_1": batch, "test_batch": batch, "batches.meta": meta}
    with tarfile.open(tmp_path / "small.tar.gz", "w:gz") as tar:
        for name, data in content.items():
            info = tarfile.TarInfo(f"{base}/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    archive = (tmp_path / "small.tar.gz").read_bytes()
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [["data_batch_1", md5_of(batch)]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", md5_of(batch)]])
    keys = {"filename": "batches.meta", "key": "label_names", "md5": md5_of(meta)}
    monkeypatch.setattr(datasets.CIFAR10, "meta", keys)
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5_of(archive))
    return tmp_path / "small.tar.gz"


def test_cifar_is_downloaded_and_tampered_batch_is_replaced(
    small_cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    with file_server(small_cifar.read_bytes()) as (url, requests):
        monkeypatch.setattr(datasets.CIFAR10, "url", url + datasets.CIFAR10.filename)
        assert len(torchvision_dataset("CIFAR10", True, str(root))) == 2
        batch = root / datasets.CIFAR10.base_folder / "data_batch_1"
        monkeypatch.chdir(tmp_path)
        batch.write_bytes(pickle.dumps(MaliciousPickle()))
        assert len(torchvision_dataset("CIFAR10", True, str(root))) == 2
        assert not (tmp_path / "was_here").exists()
        assert len(requests) == 2


def test_cifar_batch_with_wrong_hash_is_not_unpickled(
    small_cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "root" / datasets.CIFAR10.base_folder
    folder.mkdir(parents=True)
    for name in ("data_batch_1", "test_batch", "batches.meta"):
        (folder / name).write_bytes(pickle.dumps(MaliciousPickle()))
    # Nothing listens at this address.
    monkeypatch.setattr(datasets.CIFAR10, "url", "http://127.0.0.1:1/a.tar.gz")
    with pytest.raises(UserError, match=r"cifar-10-python\.tar\.gz cannot be downloaded"):
        torchvision_dataset("CIFAR10", True, str(tmp_path / "root"))
    (tmp_path / "root" / datasets.CIFAR10.filename).write_bytes(small_cifar.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"cifar-10-python\.tar\.gz is damaged: its MD5 is not"):
        torchvision_dataset("CIFAR10", True, str(tmp_path / "root"))
    assert not (tmp_path / "was_here").exists()


def test_pretrained_weights_with_wrong_hash_are_not_unpickled(
    tmp_cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_cwd))
    folder = tmp_cwd / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(MaliciousPickle(), folder / "resnet18-f37072fd.pth")
    with pytest.raises(ValueError, match=r"resnet18-f37072fd\.pth is damaged or a different file"):
        pretrained("resnet18", 10)
    assert not (tmp_cwd / "was_here").exists()


def test_pretrained_weights_are_downloaded_once_by_two_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    file = save_with_hash({"weight": torch.zeros(2)}, tmp_path, "net")
    slowly = threading.Event()
    slowly.set()
    with file_server(file.read_bytes(), wait_for=slowly) as (url, requests):
        published = PublishedWeights(f"{url}{file.name}", file.name)
        with ThreadPoolExecutor(2) as pool:
            loaded = list(pool.map(lambda _: published.load(), range(2)))
    assert [list(weights) for weights in loaded] == [["weight"]] * 2
    assert len(requests) == 1


def test_hugging_face_does_not_run_script_in_folder(tmp_cwd: Path) -> None:
    module = pytest.importorskip("app.data.hugging_face")
    pytest.importorskip("datasets")
    (tmp_cwd / "scripted").mkdir()
    (tmp_cwd / "scripted" / "scripted.py").write_text("open('was_here', 'w')\n")
    with pytest.raises(UserError, match="scripted"):
        module.hugging_face("scripted", "train")
    assert not (tmp_cwd / "was_here").exists()


# ---- tables


def test_write_csv_escapes_formulas(tmp_path: Path) -> None:
    texts = ["=1+1", "+A1", "-A1", "@SUM(A1)", "\tx", "\rx", "a\r=b", "-1.5", "+2e3", None]
    table = pd.DataFrame(
        {"=name": texts, "number": np.arange(10.0) - 5, "mixed": [*"=b", *[1] * 8]}
    )
    write_csv(tmp_path / "a.csv", table)
    found = pd.read_csv(tmp_path / "a.csv", dtype=str, keep_default_na=False)
    assert found.columns.tolist() == ["'=name", "number", "mixed"]
    assert found["'=name"].tolist() == [
        *("'=1+1", "'+A1", "'-A1", "'@SUM(A1)", "'\tx", "'\nx"),
        *("a\n=b", "-1.5", "+2e3", ""),
    ]
    assert found["mixed"].tolist()[:3] == ["'=", "b", "1"]
    assert table["=name"].tolist()[:-1] == texts[:-1]
    plain = pd.DataFrame({"a": pd.Series([1, None], dtype=object), "b": [0.1, 1e-9]})
    write_csv(tmp_path / "b.csv", plain)
    assert (tmp_path / "b.csv").read_text() == plain.to_csv(index=False)
