"""Files of strangers: archives, arrays, images, downloads, and tables that a spreadsheet opens."""

from __future__ import annotations

import gzip
import hashlib
import io
import multiprocessing as mp
import os
import pickle
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision.datasets as datasets
import yaml
from PIL import Image

from app.config.secrets import looks_secret
from app.data.archives import unpack
from app.data.arrays import npz
from app.data.cached import cached
from app.data.idx import read_idx
from app.data.images import decode, image_folder
from app.data.torchvision_sets import download_dataset, torchvision_dataset
from app.distributed.launch.failures import RankFailure
from app.models.pretrained import pretrained
from app.runtime.errors import ConfigError, UserError
from app.runtime.files import write_csv
from app.training.checkpoint.checkpoint import load_checkpoint
from tests.support.runs import Ran, job_for, mistakes_in


def md5_of(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


# ---- archives


def tar_of(path: Path, *members: tarfile.TarInfo | str) -> Path:
    """An archive with those members; a text is the name of a small file."""
    with tarfile.open(path, "w:gz") as tar:
        for member in members:
            if isinstance(member, str):
                member = tarfile.TarInfo(member)
                member.size = 3
                tar.addfile(member, io.BytesIO(b"abc"))
            else:
                tar.addfile(member, io.BytesIO(b"\0" * member.size) if member.isfile() else None)
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> Any:
    found = tarfile.TarInfo(name)
    found.type, found.linkname, found.size = kind, link, size
    return found


@pytest.mark.parametrize(
    ("members", "said"),
    [
        (["../evil", "in/a"], "would leave the folder"),
        (["/tmp/evil", "in/a"], "would leave the folder"),
        (["in/../../evil", "in/a"], "would leave the folder"),
        ([member("in/a", tarfile.SYMTYPE, "/etc/passwd")], "is a link or a device"),
        ([member("in", tarfile.SYMTYPE, "/tmp"), "in/a"], "is a link or a device"),
        ([member("in/a", tarfile.LNKTYPE, "../x")], "is a link or a device"),
        ([member("in/a", tarfile.FIFOTYPE)], "is a link or a device"),
        ([member("in/a", size=2_000_000)], "has 2,000,000 bytes; refused"),
        (["in/b"], "has no file in/a"),
    ],
)
def test_an_archive_that_would_do_harm_is_refused(
    tmp_path: Path, members: list[Any], said: str
) -> None:
    archive = tar_of(tmp_path / "a.tar.gz", *members)
    (tmp_path / "here").mkdir()
    with pytest.raises(UserError, match=said):
        unpack(archive, tmp_path / "here", ["in/a"], largest=1_000_000)
    assert [path for path in (tmp_path / "here").rglob("*") if path.is_file()] == []
    assert not (tmp_path / "evil").exists()


def test_only_what_is_wanted_is_unpacked(tmp_path: Path) -> None:
    archive = tar_of(tmp_path / "a.tar.gz", "in/a", "in/more")
    unpack(archive, tmp_path / "here", ["in/a"], largest=3)
    assert [path.name for path in (tmp_path / "here").rglob("*") if path.is_file()] == ["a"]
    archive.write_bytes(archive.read_bytes()[:60])
    with pytest.raises(UserError, match="is damaged"):
        unpack(archive, tmp_path / "here", ["in/a"], largest=3)


def test_a_link_in_the_folder_is_not_written_through(tmp_path: Path) -> None:
    archive = tar_of(tmp_path / "a.tar.gz", "in/a")
    outside, here = tmp_path / "outside", tmp_path / "here"
    outside.mkdir()
    here.mkdir()
    (here / "in").symlink_to(outside)
    with pytest.raises(UserError, match="is a link that leaves"):
        unpack(archive, here, ["in/a"], largest=3)
    assert list(outside.iterdir()) == []


def zeros(path: Path, megabytes: int) -> Path:
    """An `.npz` whose arrays are so big, and whose file is not."""
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
def test_an_npz_bomb_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[str], object]
) -> None:
    monkeypatch.setattr("app.data.archives.PLAIN", 2**22)  # a real one takes a minute to make
    path = zeros(tmp_path / "a.npz", 10)
    with pytest.raises(UserError, match=r"bytes would become 20,97.*; refused"):
        read(str(path))


@pytest.mark.parametrize("shape", [(10**15,), (10**9, 10**9), (2**62, 4), (-1,), (10**5,)])
def test_an_array_that_is_not_as_big_as_it_says(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for name in ("x", "y"):
            header = io.BytesIO()
            said = {"descr": "<f8", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(header, said)
            archive.writestr(f"{name}.npy", header.getvalue() + bytes(64))
    with pytest.raises(UserError, match=r"a\.npz: 'x\.npy' says it has .*; refused"):
        npz(str(tmp_path / "a.npz"), "x", "y")


class Evil:
    """A pickle that leaves a file."""

    def __reduce__(self) -> Any:
        return (os.system, ("touch was_here",))


def test_objects_in_an_npz_are_not_unpickled(elsewhere: Path) -> None:
    np.savez("a.npz", x=np.array([Evil()], dtype=object), y=np.zeros(1))
    with pytest.raises(UserError, match="unpickled"):
        npz("a.npz", "x", "y")
    assert not (elsewhere / "was_here").exists()


def test_a_gzip_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.data.idx.LARGEST", 10_000_000)  # a real one takes a minute to make
    (tmp_path / "a.gz").write_bytes(gzip.compress(bytes(30_000_000)))
    with pytest.raises(UserError, match="would become more than 10,000,000 bytes; refused"):
        read_idx(tmp_path / "a.gz")


# ---- images


def test_links_out_of_a_folder_of_images(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in" / "cat", tmp_path / "out"
    inside.mkdir(parents=True)
    outside.mkdir()
    for folder in (inside, outside):
        Image.new("RGB", (2, 2)).save(folder / "a.png")
    (inside / "again.png").symlink_to(inside / "a.png")
    assert len(image_folder(str(tmp_path / "in"), {})) == 2
    (inside / "b.png").symlink_to(outside / "a.png")
    with pytest.raises(UserError, match=r"b\.png is a link out of the folder.*follow_links=true"):
        image_folder(str(tmp_path / "in"), {})
    assert len(image_folder(str(tmp_path / "in"), {}, follow_links=True)) == 3
    (inside / "b.png").unlink()
    (inside / "loop").symlink_to(tmp_path / "in")
    with pytest.raises(UserError, match=r"loop is a link back to"):
        image_folder(str(tmp_path / "in"), {}, follow_links=True)


def test_an_image_bomb_is_refused(tmp_path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png cannot be read as an image.*exceeds limit"):
        decode(str(tmp_path / "a.png"))


# ---- downloads


@contextmanager
def serving(
    content: bytes, cut: int = 0, after: threading.Event | None = None
) -> Iterator[tuple[str, list[str]]]:
    """A server of one file, and what was asked of it.

    It hangs up early the first `cut` times, and says nothing until a second `after` the event.
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            if after is not None:
                after.wait(200)
                time.sleep(1)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if len(asked) <= cut else content)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}/", asked
        http.shutdown()


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_an_interrupted_download_is_completed_by_the_next_start(tmp_path: Path) -> None:
    content = os.urandom(200_000)
    with serving(content, cut=2) as (url, _):  # each start asks twice, first where it leads to
        with pytest.raises(UserError, match=r"a\.gz cannot be downloaded"):
            download_dataset(tmp_path, [url], [("a.gz", md5_of(content))])
        assert files_in(tmp_path) == []
        (tmp_path / "a.gz.part").write_bytes(content[:1000])  # as of a process that was killed
        download_dataset(tmp_path, [url], [("a.gz", md5_of(content))])
    assert (tmp_path / "a.gz").read_bytes() == content
    assert files_in(tmp_path) == ["a.gz"]


def test_a_download_with_another_hash_is_not_kept(tmp_path: Path) -> None:
    with serving(b"evil") as (url, _), pytest.raises(UserError, match=r"a\.gz cannot .*MD5 0000"):
        download_dataset(tmp_path, [url], [("a.gz", "0" * 32)])
    assert files_in(tmp_path) == []


def fetched(folder: Path, url: str, md5: str, told: Any) -> None:
    told.put("begins")
    download_dataset(folder, [url], [("a.gz", md5)])
    told.put((folder / "a.gz").stat().st_size)


def test_of_several_processes_one_downloads(tmp_path: Path) -> None:
    content, both = os.urandom(3_000_000), threading.Event()
    with serving(content, after=both) as (url, asked):
        context = mp.get_context("spawn")
        told = context.Queue()
        arguments = (tmp_path, url, md5_of(content), told)
        processes = [context.Process(target=fetched, args=arguments) for _ in range(2)]
        for process in processes:
            process.start()
        assert [told.get(timeout=200) for _ in processes] == ["begins"] * 2
        both.set()
        assert [told.get(timeout=200) for _ in processes] == [len(content)] * 2
        for process in processes:
            process.join()
    assert len(asked) == 2, "where it leads to, then the file"


@pytest.fixture
def small_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR10 as torchvision knows it, but of two images, and served from here."""
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


def test_cifar_is_downloaded_unpacked_and_repaired(
    small_cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    with serving(small_cifar.read_bytes()) as (url, asked):
        monkeypatch.setattr(datasets.CIFAR10, "url", url + datasets.CIFAR10.filename)
        assert len(torchvision_dataset("CIFAR10", True, str(root))) == 2
        batch = root / datasets.CIFAR10.base_folder / "data_batch_1"
        monkeypatch.chdir(tmp_path)
        batch.write_bytes(pickle.dumps(Evil()))
        assert len(torchvision_dataset("CIFAR10", True, str(root))) == 2
        assert not (tmp_path / "was_here").exists()
        assert len(asked) == 2


def test_a_batch_of_cifar_with_another_hash_is_not_unpickled(
    small_cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "root" / datasets.CIFAR10.base_folder
    folder.mkdir(parents=True)
    for name in ("data_batch_1", "test_batch", "batches.meta"):
        (folder / name).write_bytes(pickle.dumps(Evil()))
    monkeypatch.setattr(datasets.CIFAR10, "url", "http://127.0.0.1:1/a.tar.gz")  # nobody listens
    with pytest.raises(UserError, match=r"cifar-10-python\.tar\.gz cannot be downloaded"):
        torchvision_dataset("CIFAR10", True, str(tmp_path / "root"))
    (tmp_path / "root" / datasets.CIFAR10.filename).write_bytes(small_cifar.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"cifar-10-python\.tar\.gz is damaged: its MD5 is not"):
        torchvision_dataset("CIFAR10", True, str(tmp_path / "root"))
    assert not (tmp_path / "was_here").exists()


def test_weights_with_another_hash_are_not_unpickled(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(elsewhere))
    folder = elsewhere / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(Evil(), folder / "resnet18-f37072fd.pth")
    with pytest.raises(ValueError, match=r"resnet18-f37072fd\.pth is damaged or another"):
        pretrained("resnet18", 10)
    assert not (elsewhere / "was_here").exists()


def test_a_folder_of_hugging_face_does_not_run_its_script(elsewhere: Path) -> None:
    hub = pytest.importorskip("app.data.hugging_face")
    pytest.importorskip("datasets")
    (elsewhere / "sly").mkdir()
    (elsewhere / "sly" / "sly.py").write_text("open('was_here', 'w')\n")
    with pytest.raises(UserError, match="sly"):
        hub.hugging_face("sly", "train")
    assert not (elsewhere / "was_here").exists()


# ---- tables


def test_no_cell_is_a_formula(tmp_path: Path) -> None:
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


# ---- secrets


TOKEN = "hunter2-hunter2"
CALLBACK = """
from app.callbacks.callback import Callback


class Told(Callback):
    def __init__(self, api, url, config, folder):
        with open("told", "a") as file:
            file.write(f"{api} {url} {'@' in str(config)} ")
        self.said = f"{api} is wrong"

    def on_run_end(self, history):
        import os
        if "BREAK" in os.environ:
            raise RuntimeError(self.said)
"""
WORDS = (
    *("+callbacks.told._target_=told.Told", "trusted_targets=[told]"),
    *("+callbacks.told.api=${oc.env:MY_API_TOKEN}", "+callbacks.told.url=${oc.env:MY_URL}"),
    *("+tags=['a ${callbacks.told.api}']", "model=mlp", "debug=fast"),
)


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        *((name, True) for name in ("WANDB_API_KEY", "HF_TOKEN", "db_password", "AUTH", "secret")),
        *((name, True) for name in ("AWS_SECRET_ACCESS_KEY", "credentials", "key", "OPENAI-KEY")),
        *(
            (name, False)
            for name in ("APP_DATA", "HOME", "KEYBOARD", "author", "monkey", "path", "PWD")
        ),
    ],
)
def test_what_looks_secret(name: str, secret: bool) -> None:
    assert looks_secret(name) is secret


def test_a_secret_is_used_and_never_saved(app: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "told.py").write_text(CALLBACK)
    given = {"MY_API_TOKEN": TOKEN, "MY_URL": "http://tracker"}
    ran = app(*WORDS, **given)
    assert ran.code == 0, ran.err + ran.out
    assert (tmp_path / "told").read_text().startswith(f"{TOKEN} http://tracker")
    assert saying(tmp_path / "outputs", TOKEN) == []
    assert TOKEN not in ran.out + ran.err
    assert ran.config["callbacks"]["told"]["api"] == "${oc.env:MY_API_TOKEN}"
    assert ran.config["callbacks"]["told"]["url"] == "http://tracker"
    assert ran.config["tags"] == ["a ${oc.env:MY_API_TOKEN}"]
    saved = load_checkpoint(ran.folder / "checkpoints" / "best.pt").config
    assert saved is not None
    assert TOKEN not in str(saved)
    tested = (f"ckpt={ran.folder}", "mode=test", "trusted_targets=[told]")
    unasked = app(*tested, MY_API_TOKEN="another-token", MY_URL="http://tracker")
    assert unasked.code == 2
    assert "the saved run reads this variable; if it may, type ++callbacks.told.api=" in unasked.err
    tested = (*tested, "++callbacks.told.api=${oc.env:MY_API_TOKEN}")
    missing = app(*tested, MY_URL="http://tracker")
    assert missing.code == 2
    assert "callbacks.told.api" in missing.err
    assert "'MY_API_TOKEN' not found" in missing.err
    again = app(*tested, MY_API_TOKEN="another-token", MY_URL="http://tracker")
    assert again.code == 0, again.err
    assert "another-token http://tracker" in (tmp_path / "told").read_text()
    assert saying(tmp_path / "outputs", "another-token") == []


def saying(folder: Path, text: str) -> list[Path]:
    """The files that hold a text."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if text.encode() in path.read_bytes()]


def test_a_sweep_keeps_no_secret(app: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "told.py").write_text(CALLBACK)
    ran = app("-m", *WORDS, "seed=0,1", MY_API_TOKEN=TOKEN, MY_URL="http://tracker", BREAK="1")
    assert ran.code == 1
    assert "is wrong" in ran.out + ran.err
    assert TOKEN not in ran.out + ran.err
    assert saying(tmp_path / "outputs", TOKEN) == []
    (base,) = tmp_path.glob("outputs/sweeps/*/*/.sweep/base.yaml")
    assert yaml.safe_load(base.read_text())["callbacks"]["told"]["url"] == "http://tracker"


def test_an_error_does_not_tell_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_TOKEN", TOKEN)
    (said,) = mistakes_in("optimizer.lr=${oc.env:MY_API_TOKEN}")
    assert "optimizer.lr='${oc.env:MY_API_TOKEN}' does not fit" in said
    failure = RankFailure.from_exception(0, RuntimeError(f"{TOKEN} is wrong"))
    assert TOKEN not in failure.error + failure.trace


def test_a_path_in_the_environment_stays_readable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APP_DATA", "/my/data")
    assert job_for("data=cifar10").plain["data"]["source"]["train"]["root"] == "/my/data"


def test_a_secret_is_not_copied_into_the_jobs_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MY_API_TOKEN", TOKEN)
    with pytest.raises(ConfigError, match=r"env_set\.MY_API_TOKEN would be saved with the run"):
        mistakes_in("hydra.job.env_copy=[MY_API_TOKEN]")
