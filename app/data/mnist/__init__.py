"""MNIST, from files included in the package; see LICENSE.md in this folder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from torch import Tensor
from torch.utils.data import TensorDataset

from app.data.idx import read_idx

MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def mnist(train: bool, root: str | None = None) -> TensorDataset:
    """Load the 60,000 training or 10,000 test digits of MNIST (LeCun et al. 1998).

    Args:
        train: Whether to load the training digits or the test digits.
        root: A folder with the four gzip files; None uses those included in the package.

    Returns:
        Images, uint8 of shape (N, 1, 28, 28), and labels, int64 of shape (N,).

    Raises:
        UserError: A file is missing or damaged.
    """
    images, labels = _read(Path(root), train, MD5) if root else _read_included(train)
    return TensorDataset(images, labels)


@cache
def _read_included(train: bool) -> tuple[Tensor, Tensor]:
    """Read the included digits once in a process, which may run many jobs.

    The checksums in the files reveal damage; that the files are those of MNIST need not be checked.
    """
    return _read(Path(__file__).parent, train, {})


def _read(folder: Path, train: bool, md5: Mapping[str, str]) -> tuple[Tensor, Tensor]:
    prefix = "train" if train else "t10k"
    images, labels = f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"
    return (
        read_idx(folder / f"{images}.gz", md5.get(images)).unsqueeze(1),
        read_idx(folder / f"{labels}.gz", md5.get(labels)).long(),
    )


def digit_and_parity(train: bool, root: str | None = None) -> TensorDataset:
    """Load the digits of `mnist` with two targets each.

    Args:
        train: Same as in `mnist`.
        root: Same as in `mnist`.

    Returns:
        Images, uint8 of shape (N, 1, 28, 28); digits, int64 of shape (N,); and parities (0 even,
        1 odd), int64 of shape (N,).
    """
    images, digits = mnist(train, root).tensors
    return TensorDataset(images, digits, digits % 2)
