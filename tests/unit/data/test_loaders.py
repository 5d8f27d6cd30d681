"""Data: read whole and checked, cut, ordered by (seed, epoch), transformed by batches."""

from __future__ import annotations

import functools
import gzip
import hashlib
import shutil
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

from app.data.arrays import csv, npz
from app.data.augment import RandomFlip, RandomShift
from app.data.batch import BatchPreparer
from app.data.idx import read_idx
from app.data.images import image_folder
from app.data.loaders import DataLoaderOptions, SampleLoader, TensorLoader
from app.data.mnist import mnist
from app.data.sampling import EpochSampler
from app.data.split import check_datasets, labels_of, size, split
from app.data.torchvision_sets import download_dataset, torchvision_dataset
from app.data.transform import BatchTransform, channel_statistics
from app.runtime.errors import UserError

CPU = torch.device("cpu")
EMBEDDED = Path(__file__).parents[3] / "app" / "data" / "mnist"


def same(x: torch.Tensor) -> torch.Tensor:
    return x


def numbers(count: int = 10) -> TensorDataset:
    return TensorDataset(torch.arange(count).float()[:, None], torch.arange(count) % 3)


# ---- sources


def test_mnist_is_whole_and_real() -> None:
    images, labels = mnist(train=False).tensors
    assert images.shape == (10_000, 1, 28, 28)
    assert images.dtype == torch.uint8
    assert labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert size(mnist(train=True)) == 60_000


def test_damaged_mnist_is_refused_by_its_md5(tmp_path: Path) -> None:
    for file in EMBEDDED.glob("t10k*.gz"):
        shutil.copy(file, tmp_path)
    path = tmp_path / "t10k-labels-idx1-ubyte.gz"
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[100] ^= 1
    path.write_bytes(gzip.compress(bytes(content)))
    with pytest.raises(UserError, match=r"t10k-labels.*is damaged: its content has MD5"):
        mnist(train=False, root=str(tmp_path))


@pytest.mark.parametrize("cut", [0, 5, 1000])
def test_truncated_mnist_is_refused(tmp_path: Path, cut: int) -> None:
    for file in EMBEDDED.glob("t10k*.gz"):
        shutil.copy(file, tmp_path)
    path = tmp_path / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"is damaged|is not an IDX file"):
        mnist(train=False, root=str(tmp_path))


def test_idx_of_another_length_than_its_header_says_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(b"\0\0\x08\x01" + struct.pack(">I", 5) + b"abc"))
    with pytest.raises(UserError, match="do not hold shape"):
        read_idx(path)


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """A real HTTP server on this machine."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}/"
        http.shutdown()


def test_download_checks_what_it_brings(tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    (there / "a.gz").write_bytes(b"content")
    md5 = hashlib.md5(b"content").hexdigest()
    with server(there) as url:
        download_dataset(here, [url], [("a.gz", md5)])
        assert (here / "a.gz").read_bytes() == b"content"
        with pytest.raises(UserError, match="cannot be downloaded"):
            download_dataset(here / "b", [url], [("a.gz", "0" * 32)])
    assert {path.name for path in here.rglob("*") if path.is_file()} == {"a.gz", ".download.lock"}


def test_a_file_with_another_md5_is_refused(tmp_path: Path) -> None:
    raw = tmp_path / "KMNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte.gz").write_bytes(b"wrong")
    with pytest.raises(UserError, match=r"is damaged: its MD5 is not bdb8.*delete it"):
        torchvision_dataset("KMNIST", train=True, root=str(tmp_path))


@pytest.mark.parametrize("name", ["FashionMNIST", "CIFAR10", "CIFAR100", "SVHN"])
def test_offline_says_what_to_put_where(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "SVHN":
        pytest.importorskip("scipy", reason="SVHN needs the extra svhn")
    monkeypatch.setattr("urllib.request._opener", None)  # it remembers proxies
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:1")  # nothing listens there
    with pytest.raises(UserError, match=r"cannot be downloaded.*put .*MD5 .*into") as caught:
        torchvision_dataset(name, train=True, root=str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_npz_reads_images_and_tables(tmp_path: Path) -> None:
    path = str(tmp_path / "a.npz")
    np.savez(
        path, x=np.zeros((4, 8, 8, 3), np.uint8), y=np.arange(4, dtype=np.int8), t=np.ones((4, 2))
    )
    images, labels = npz(path, "x", "y", channels_last=True).tensors
    assert (images.shape, images.dtype) == ((4, 3, 8, 8), torch.uint8)
    assert labels.dtype == torch.int64
    assert npz(path, "t", "y").tensors[0].dtype == torch.float32


def test_npz_names_what_is_wrong(tmp_path: Path) -> None:
    path = str(tmp_path / "a.npz")
    np.savez(path, images=np.zeros((4, 2)), y=np.zeros(3))
    with pytest.raises(
        UserError, match=r"no array 'image'; it has: images, y; did you mean 'images'"
    ):
        npz(path, "image", "y")
    with pytest.raises(UserError, match="4 samples in 'images', 3 in 'y'"):
        npz(path, "images", "y")
    with pytest.raises(UserError, match="is not a file"):
        npz(str(tmp_path / "none.npz"), "x", "y")


class Evil:
    """A pickle that would run code."""

    def __reduce__(self) -> Any:
        return (open, ("was_here", "w"))


def test_npz_never_unpickles(elsewhere: Path) -> None:
    np.savez("a.npz", x=np.array([Evil()], dtype=object), y=np.zeros(1))
    with pytest.raises(UserError, match=r"is not an \.npz file of plain arrays"):
        npz("a.npz", "x", "y")
    assert not (elsewhere / "was_here").exists()


def test_csv_reads_numbers_and_classes(tmp_path: Path) -> None:
    path = str(tmp_path / "a.csv")
    pd.DataFrame({"a": [1, 2], "b": [0.5, 1.5], "label": ["dog", "cat"]}).to_csv(path, index=False)
    x, y = csv(path, "label", classes=["cat", "dog"]).tensors
    assert x.tolist() == [[1.0, 0.5], [2.0, 1.5]]
    assert y.tolist() == [1, 0]
    assert csv(path, "b", features=["a"], regression=True).tensors[1].tolist() == [[0.5], [1.5]]


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("a,label\n1,0\n,1\n", {}, "line 3, column 'a': nan is no finite number"),
        ("a,label\n1,0\nx,1\n", {}, "line 3, column 'a': x is no finite number"),
        ("a,lable\n1,0\n", {}, "no column 'label'; it has: a, lable; did you mean 'lable'"),
        ("a,label\n1,0.5\n", {}, "holds 0.5, no class number"),
        ("a,label\n1,cow\n", {"classes": ["cat"]}, "class 'cow' is not among cat"),
        ("", {}, "cannot be read as a table"),
    ],
)
def test_csv_names_what_is_wrong(
    tmp_path: Path, text: str, options: dict[str, Any], said: str
) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        csv(str(path), "label", **options)


# ---- cutting and looking over


def test_split_depends_on_its_seed_alone_and_loses_nothing() -> None:
    first, again, other = (split({"train": numbers(100)}, 10, 0.2, seed=seed) for seed in (1, 1, 2))
    assert {stage: size(part) for stage, part in first.items()} == {
        "train": 70,
        "valid": 10,
        "test": 20,
    }
    values = [part.tensors[0].flatten().tolist() for part in first.values()]  # type: ignore[attr-defined]
    assert sorted(chain(*values)) == list(range(100))
    same_, unlike = again["valid"].tensors[0], other["valid"].tensors[0]  # type: ignore[attr-defined]
    assert torch.equal(first["valid"].tensors[0], same_)  # type: ignore[attr-defined]
    assert not torch.equal(first["valid"].tensors[0], unlike)  # type: ignore[attr-defined]


def test_split_of_more_than_there_is_is_refused() -> None:
    with pytest.raises(UserError, match="leave nothing of 10 training samples"):
        split({"train": numbers(10)}, 8, 0.2, seed=0)


@pytest.mark.parametrize(
    ("dataset", "classes", "said"),
    [
        (TensorDataset(torch.zeros(0, 1), torch.zeros(0).long()), 3, "has no samples"),
        (numbers(), 2, "has the label 2; allowed: 0 to 1"),
        (TensorDataset(torch.zeros(1, 1), torch.tensor([-1])), 3, "has the label -1"),
        (TensorDataset(torch.zeros(1, 1), torch.zeros(1)), 3, "class labels are whole numbers"),
    ],
)
def test_data_is_looked_over(dataset: TensorDataset, classes: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_datasets({"train": dataset}, classes, 1)


def test_a_class_without_a_sample_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    check_datasets({"train": numbers()}, 5, 1)
    assert "no sample of class 3, 4 in the train data" in caplog.text


# ---- batches


def test_order_depends_on_seed_and_epoch_alone() -> None:
    order = EpochSampler.limited(100, 10, None, shuffle_seed=7)
    assert torch.equal(order.indices(3), EpochSampler.limited(100, 25, None, 7).indices(3))
    assert not torch.equal(order.indices(3), order.indices(4))
    assert not torch.equal(order.indices(3), EpochSampler.limited(100, 10, None, 8).indices(3))
    assert order.indices(3).sort().values.tolist() == list(range(100))


@pytest.mark.parametrize(
    ("limit", "count"), [(None, 95), (3, 30), (0.5, 50), (0.001, 10), (99, 95)]
)
def test_limits_count_batches_or_shares(limit: int | float | None, count: int) -> None:
    assert EpochSampler.limited(95, 10, limit, None).count == count


@pytest.mark.parametrize("on_device", [True, False])
def test_tensor_loader_gives_every_sample_once(on_device: bool) -> None:
    order = EpochSampler.limited(10, 4, None, shuffle_seed=0)
    loader = TensorLoader(numbers(), order, 4, BatchPreparer(CPU, same), on_device)
    batches = list(loader.epoch(1))
    assert [len(y) for _, y in batches] == [4, 4, 2]
    assert loader.num_batches == 3
    assert sorted(torch.cat([x for x, _ in batches]).flatten().tolist()) == list(range(10))
    assert all(torch.equal(x.flatten().long() % 3, y) for x, y in batches)


class Noisy(Dataset[Any]):
    """Samples that draw random numbers from every generator."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> Any:
        return torch.rand(1) + np.random.rand() + index, index


def noisy_loader(workers: int, **options: Any) -> SampleLoader:
    order = EpochSampler.limited(7, 3, None, shuffle_seed=0)
    reading = DataLoaderOptions(workers, persistent_workers=workers > 0, **options)
    return SampleLoader(Noisy(), order, 3, BatchPreparer(CPU, same), 5, reading)


def test_samples_are_the_same_whichever_process_reads_them() -> None:
    alone, with_workers = noisy_loader(0), noisy_loader(2)
    for epoch in (1, 2):
        for (x, y), (a, b) in zip(alone.epoch(epoch), with_workers.epoch(epoch), strict=True):
            assert torch.equal(x, a)
            assert torch.equal(y, b)
    first, second = (torch.cat([x for x, _ in alone.epoch(n)]).sort().values for n in (1, 2))
    assert not torch.equal(first, second), "every epoch draws anew"


def test_reading_samples_leaves_the_generators_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    list(noisy_loader(0).epoch(1))
    assert torch.equal(torch.rand(1), expected)


def test_image_folder_reads_images_by_class(tmp_path: Path) -> None:
    for label, name in enumerate(("cat", "dog")):
        for number in range(3):
            (tmp_path / name).mkdir(exist_ok=True)
            picture = Image.new("RGB", (30, 20 + number), (100 * label, 0, 0))
            picture.save(tmp_path / name / f"{number}.png")
    from torchvision.transforms import v2

    dataset = image_folder(str(tmp_path), {"resize": v2.Resize([8, 8])})
    image, label = dataset[5]
    assert (image.shape, image.dtype, label) == ((3, 8, 8), torch.uint8, 1)
    assert labels_of(dataset, 1).tolist() == [0, 0, 0, 1, 1, 1]  # type: ignore[union-attr]
    with pytest.raises(UserError, match="has 2 classes: cat, dog"):
        check_datasets({"train": dataset}, 3, 1)
    (tmp_path / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"0\.png cannot be read as an image"):
        dataset[0]
    with pytest.raises(UserError, match="is not a folder"):
        image_folder(str(tmp_path / "none"), {})


# ---- transforms


def transform(**options: Any) -> BatchTransform:
    plain: dict[str, Any] = {
        "mean": None,
        "std": None,
        "size": None,
        "channels": None,
        "memory_format": torch.contiguous_format,
    }
    return BatchTransform(**(plain | options))


def test_bytes_are_scaled_and_normalised_per_channel() -> None:
    x = torch.randint(0, 256, (4, 3, 5, 5), dtype=torch.uint8)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    found = transform(mean=mean[:, None, None], std=std[:, None, None])(x)
    from torchvision.transforms import v2

    plain = v2.functional.to_dtype(x, torch.float32, scale=True)
    expected = v2.functional.normalize(plain, mean.tolist(), std.tolist())
    torch.testing.assert_close(found, expected)  # rounding of one multiplication more or less


def test_transforms_leave_the_stored_data_alone() -> None:
    x = torch.rand(2, 1, 4, 4)
    before = x.clone()
    transform(mean=torch.tensor([0.5])[:, None, None], std=torch.tensor([2.0])[:, None, None])(x)
    assert torch.equal(x, before)


def test_resize_and_channels() -> None:
    x = torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8)
    assert transform(size=64, channels=3)(x).shape == (2, 3, 64, 64)
    assert transform(channels=1)(x.expand(-1, 3, -1, -1)).shape == (2, 1, 28, 28)
    with pytest.raises(UserError, match=r"data\.channels=4, but the images have 1"):
        transform(channels=4)(x)


def test_memory_format() -> None:
    x = torch.rand(2, 3, 8, 8)
    assert transform(memory_format=torch.channels_last)(x).is_contiguous(
        memory_format=torch.channels_last
    )


def test_measured_statistics_normalise_to_zero_and_one() -> None:
    x = torch.randint(0, 256, (50, 2, 6, 6), dtype=torch.uint8)
    mean, std = channel_statistics(TensorDataset(x, torch.zeros(50)))
    y = (x.double() / 255 - torch.tensor(mean).view(2, 1, 1)) / torch.tensor(std).view(2, 1, 1)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(2).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(y.std((0, 2, 3), correction=0), torch.ones(2).double())


def test_every_image_draws_its_own_shift() -> None:
    torch.manual_seed(0)
    image = torch.rand(1, 1, 9, 9)
    shifted = RandomShift(2)(image.expand(64, -1, -1, -1))
    padded = torch.nn.functional.pad(image, [2] * 4)[0]
    places = {(r, c): padded[:, r : r + 9, c : c + 9] for r in range(5) for c in range(5)}
    found = [k for x in shifted for k, place in places.items() if torch.equal(x, place)]
    assert len(found) == 64, "each is one of the 25 crops of the padded image"
    assert len(set(found)) > 10


def test_every_image_draws_its_own_flip() -> None:
    torch.manual_seed(0)
    image = torch.rand(1, 3, 4, 4)
    flipped = RandomFlip(0.5)(image.expand(64, -1, -1, -1))
    count = sum(torch.equal(x, image[0].flip(-1)) for x in flipped)
    assert count + sum(torch.equal(x, image[0]) for x in flipped) == 64
    assert 16 < count < 48
