"""The small data sets that torchvision downloads, whole in memory, integrity-checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
import torchvision.datasets as datasets
from filelock import FileLock
from torch.utils.data import TensorDataset
from torchvision.datasets.utils import check_integrity, check_md5, download_url

from app.data.archives import unpack
from app.data.idx import read_idx
from app.runtime.errors import UserError

IDX_SETS = ("FashionMNIST", "KMNIST")
ARCHIVES = ("CIFAR10", "CIFAR100")
BATCH = 500_000_000  # bytes that a file in an archive may have; the largest has 155 million


def torchvision_dataset(name: str, train: bool, root: str) -> TensorDataset:
    """A data set by torchvision's name.

    Args:
        name: FashionMNIST, KMNIST, CIFAR10, CIFAR100 or SVHN.
        train: The training samples, else those of the test.
        root: The folder that holds the files, or into which they are downloaded.

    Returns:
        Images, uint8 of shape (N, C, H, W), and labels, int64 of shape (N,).

    Raises:
        UserError: Files are damaged, or are missing and cannot be downloaded.
    """
    if name in IDX_SETS:
        source = getattr(datasets, name)
        folder = Path(root) / name / "raw"
        download_dataset(folder, source.mirrors, source.resources)
        prefix = "train" if train else "t10k"
        images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz").unsqueeze(1)
        return TensorDataset(images, read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz").long())
    if name in ARCHIVES:
        found = _unpacked(name, root, train)
        images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
        return TensorDataset(images, torch.tensor(found.targets))
    if name == "SVHN":
        _require_scipy()
        split = "train" if train else "test"
        url, file, md5 = datasets.SVHN.split_list[split]
        download_dataset(Path(root), [url.removesuffix(file)], [(file, md5)])
        found = datasets.SVHN(root, split)
        return TensorDataset(torch.from_numpy(found.data), torch.from_numpy(found.labels).long())
    raise UserError(
        f"name={name!r} is not known; allowed: {', '.join((*IDX_SETS, *ARCHIVES))}, SVHN"
    )


def download_dataset(
    folder: Path, mirrors: Sequence[str], files: Sequence[tuple[str, str]]
) -> None:
    """Downloads what is missing of (file name, MD5), and checks all of it.

    Of several processes one downloads, and the others wait for it.

    Raises:
        UserError: A file is there with another MD5, or is missing and no mirror answers.
    """
    if all((folder / name).exists() for name, _ in files):
        _fetch_alone(folder, mirrors, files)
        return
    with _alone(folder):
        _fetch_alone(folder, mirrors, files)


def _fetch_alone(folder: Path, mirrors: Sequence[str], files: Sequence[tuple[str, str]]) -> None:
    for name, md5 in files:
        path = folder / name
        if not path.exists():
            _download(path, mirrors, md5)
        elif not check_md5(str(path), md5):
            raise UserError(f"{path} is damaged: its MD5 is not {md5}; delete it")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other process does the same in that folder; a lock ends with its process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".download.lock")
        lock.acquire()
    except OSError:  # a folder of others, which cannot be written to, has all or is of no use
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _download(path: Path, mirrors: Sequence[str], md5: str) -> None:
    reasons = []
    partial = path.with_name(f"{path.name}.part")
    for mirror in mirrors:
        try:
            download_url(f"{mirror}{path.name}", str(path.parent), partial.name, md5)
        except (URLError, RuntimeError, OSError) as error:
            reasons.append(f"{mirror}: {error}")
        else:
            partial.replace(path)
            return
        finally:
            partial.unlink(missing_ok=True)
    raise UserError(
        f"{path.name} cannot be downloaded ({'; '.join(reasons)}); "
        f"put it (MD5 {md5}) into {path.parent}"
    )


def _unpacked(name: str, root: str, train: bool) -> Any:
    """Its batches are pickles: torchvision reads none whose MD5 is not the known one."""
    source, folder = getattr(datasets, name), Path(root)
    parts = [*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])]
    files = {f"{source.base_folder}/{file}": md5 for file, md5 in parts}
    with _alone(folder):
        if not all(check_integrity(str(folder / file), md5) for file, md5 in files.items()):
            mirror = source.url.removesuffix(source.filename)
            _fetch_alone(folder, [mirror], [(source.filename, source.tgz_md5)])
            unpack(folder / source.filename, folder, files, BATCH)
    try:
        return source(root, train=train)
    except (RuntimeError, OSError) as error:
        raise UserError(f"{folder / source.base_folder} is damaged ({error}); delete it") from error


def _require_scipy() -> None:
    try:
        import scipy.io  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError('SVHN needs scipy: pip install "torch-experiment-app[svhn]"') from error
