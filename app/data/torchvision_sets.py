"""Small datasets that torchvision can download, checked by MD5 and read into memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
import torchvision.datasets as datasets
from torch.utils.data import TensorDataset
from torchvision.datasets.utils import check_integrity, check_md5, download_url

from app.data.archives import unpack
from app.data.idx import read_idx
from app.runtime.errors import UserError
from app.runtime.extras import import_extra
from app.runtime.lock import download_lock

IDX_DATASETS = ("FashionMNIST", "KMNIST")
CIFAR_DATASETS = ("CIFAR10", "CIFAR100")
MAX_MEMBER_BYTES = 500_000_000  # per file in an archive; the largest has 155 million


def torchvision_dataset(name: str, train: bool, root: str) -> TensorDataset:
    """Load a dataset by its name in torchvision.

    Args:
        name: FashionMNIST, KMNIST, CIFAR10, CIFAR100 or SVHN.
        train: Whether to load the training samples or the test samples.
        root: The folder that contains the files, or into which they are downloaded.

    Returns:
        Images, uint8 of shape (N, C, H, W), and labels, int64 of shape (N,).

    Raises:
        UserError: Files are damaged, or are missing and cannot be downloaded.
    """
    if name in IDX_DATASETS:
        source = getattr(datasets, name)
        folder = Path(root) / name / "raw"
        download_dataset(folder, source.mirrors, source.resources)
        prefix = "train" if train else "t10k"
        images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz").unsqueeze(1)
        return TensorDataset(images, read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz").long())
    if name in CIFAR_DATASETS:
        cifar = _load_cifar(name, root, train)
        images = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous()
        return TensorDataset(images, torch.tensor(cifar.targets))
    if name == "SVHN":
        import_extra("scipy", "svhn")
        split = "train" if train else "test"
        url, file, md5 = datasets.SVHN.split_list[split]
        download_dataset(Path(root), [url.removesuffix(file)], [(file, md5)])
        svhn = datasets.SVHN(root, split)
        return TensorDataset(torch.from_numpy(svhn.data), torch.from_numpy(svhn.labels).long())
    raise UserError(
        f"name={name!r} is unknown; allowed: {', '.join((*IDX_DATASETS, *CIFAR_DATASETS))}, SVHN"
    )


def _load_cifar(name: str, root: str, train: bool) -> Any:
    # The batches are pickles; torchvision refuses to load one with an unexpected MD5.
    source, folder = getattr(datasets, name), Path(root)
    parts = [*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])]
    files = {f"{source.base_folder}/{file}": md5 for file, md5 in parts}
    with download_lock(folder):
        if not all(check_integrity(str(folder / file), md5) for file, md5 in files.items()):
            mirror = source.url.removesuffix(source.filename)
            _download_missing(folder, [mirror], [(source.filename, source.tgz_md5)])
            unpack(folder / source.filename, folder, files, MAX_MEMBER_BYTES)
    try:
        return source(root, train=train)
    except (RuntimeError, OSError) as error:
        raise UserError(f"{folder / source.base_folder} is damaged ({error}); delete it") from error


def download_dataset(
    folder: Path, mirrors: Sequence[str], files: Sequence[tuple[str, str]]
) -> None:
    """Download the missing files, and check the MD5 of all of them.

    If several processes do this at once, one downloads and the others wait for it.

    Args:
        folder: Destination folder.
        mirrors: Base URLs, tried in order.
        files: Pairs of (file name, MD5).

    Raises:
        UserError: An existing file has another MD5, or a missing one cannot be downloaded.
    """
    if all((folder / name).exists() for name, _ in files):
        _download_missing(folder, mirrors, files)
        return
    with download_lock(folder):
        _download_missing(folder, mirrors, files)


def _download_missing(
    folder: Path, mirrors: Sequence[str], files: Sequence[tuple[str, str]]
) -> None:
    for name, md5 in files:
        path = folder / name
        if not path.exists():
            _download(path, mirrors, md5)
        elif not check_md5(str(path), md5):
            raise UserError(f"{path} is damaged: its MD5 is not {md5}; delete it")


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
