"""The small data sets that torchvision downloads, whole in memory, integrity-checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
import torchvision.datasets as datasets
from torch.utils.data import TensorDataset
from torchvision.datasets.utils import check_md5, download_url

from app.config.errors import UserError
from app.data.idx import read_idx

IDX_SETS = ("FashionMNIST", "KMNIST")
ARCHIVES = ("CIFAR10", "CIFAR100")


def vision(name: str, train: bool, root: str) -> TensorDataset:
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
        fetch(folder, source.mirrors, source.resources)
        prefix = "train" if train else "t10k"
        images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz").unsqueeze(1)
        return TensorDataset(images, read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz").long())
    if name in ARCHIVES:
        found = _downloaded(name, root, train=train)
        images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
        return TensorDataset(images, torch.tensor(found.targets))
    if name == "SVHN":
        _require_scipy()
        found = _downloaded(name, root, split="train" if train else "test")
        return TensorDataset(torch.from_numpy(found.data), torch.from_numpy(found.labels).long())
    raise UserError(
        f"name={name!r} is not known; allowed: {', '.join((*IDX_SETS, *ARCHIVES))}, SVHN"
    )


def fetch(folder: Path, mirrors: Sequence[str], files: Sequence[tuple[str, str]]) -> None:
    """Downloads what is missing of (file name, MD5), and checks all of it.

    Raises:
        UserError: A file is there with another MD5, or is missing and no mirror answers.
    """
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


def _downloaded(name: str, root: str, **which: Any) -> Any:
    source = getattr(datasets, name)
    try:
        return source(root, download=True, **which)
    except (URLError, RuntimeError, OSError) as error:
        raise UserError(
            f"{name} cannot be downloaded or is damaged ({error}); put {_what(source, which)} "
            f"into {root}, unpacked"
        ) from error


def _what(source: Any, which: dict[str, Any]) -> str:
    if hasattr(source, "split_list"):
        url, file, md5 = source.split_list[which["split"]]
        return f"{file} (from {url}, MD5 {md5})"
    return f"{source.filename} (from {source.url}, MD5 {source.tgz_md5})"


def _require_scipy() -> None:
    try:
        import scipy.io  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError('SVHN needs scipy: pip install "torch-experiment-app[svhn]"') from error
