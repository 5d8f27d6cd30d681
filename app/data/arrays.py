"""A user's own arrays (npz) and tables (csv), whole in memory."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from app.data.archives import check_npz
from app.runtime.errors import UserError, nearest, one_of

# What NumPy and zipfile raise for files with wrong bits, or with sizes that are not true.
DAMAGES = (zipfile.BadZipFile, zlib.error, EOFError, OSError, MemoryError, NotImplementedError)


def npz(path: str, inputs: str, targets: str, channels_last: bool = False) -> TensorDataset:
    """Two arrays of a NumPy file.

    Args:
        path: The `.npz` file; nothing in it is unpickled.
        inputs: Name of the array of N samples. (N, H, W) becomes (N, 1, H, W).
        targets: Name of the array of N labels (whole numbers) or values.
        channels_last: The samples are (H, W, C).

    Raises:
        UserError: The file or an array is missing, damaged, or of the wrong kind.
    """
    arrays = _load(path, (inputs, targets))
    x, y = arrays[inputs], arrays[targets]
    if len(x) != len(y):
        raise UserError(f"{path}: {len(x)} samples in {inputs!r}, {len(y)} in {targets!r}")
    x = np.moveaxis(x, -1, 1) if channels_last else x
    x = x[:, None] if x.ndim == 3 else x
    return TensorDataset(_inputs(x), _targets(y))


def _load(path: str, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    if not Path(path).is_file():
        raise UserError(f"{path!r} is not a file")
    try:
        check_npz(Path(path))
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in names if name not in file]
            if missing:
                close = nearest(missing[0], file)
                raise UserError(f"{path}: no array {missing[0]!r}; it has: {one_of(file)}{close}")
            return {name: file[name] for name in names}
    except UserError:
        raise
    except DAMAGES as error:
        raise UserError(f"{path} is damaged: {error}") from error
    except (ValueError, AttributeError, SyntaxError) as error:
        raise UserError(f"{path} is not an .npz file of plain arrays: {error}") from error


def _inputs(x: np.ndarray) -> Tensor:
    if x.dtype.kind not in "uif":
        raise UserError(f"samples of type {x.dtype} are no numbers")
    x = np.ascontiguousarray(x)
    return torch.from_numpy(x) if x.dtype == np.uint8 else torch.from_numpy(x.astype(np.float32))


def _targets(y: np.ndarray) -> Tensor:
    if y.dtype.kind in "ui":
        return torch.from_numpy(y.astype(np.int64))
    if y.dtype.kind == "f":
        return torch.from_numpy(y.astype(np.float32))
    raise UserError(f"labels of type {y.dtype} are no numbers")


def csv(
    path: str,
    target: str,
    features: list[str] | None = None,
    classes: list[str] | None = None,
    regression: bool = False,
) -> TensorDataset:
    """A table with a header line.

    Args:
        path: The file.
        target: Name of the column of labels.
        features: Names of the columns of features; None takes all the others.
        classes: The texts in the label column, in the order of their numbers; None where it
            holds numbers 0, 1, ... already.
        regression: The target is a value, not a label.

    Returns:
        Features, float32 of shape (N, columns), and int64 labels of shape (N,) or, for a
        regression, float32 values of shape (N, 1).

    Raises:
        UserError: The file or a column is missing, or a cell is empty or no number.
    """
    if not Path(path).is_file():
        raise UserError(f"{path!r} is not a file")
    try:
        table = pd.read_csv(path)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a table: {error}") from error
    columns = features or [str(name) for name in table.columns if name != target]
    for name in [target, *columns]:
        if name not in table.columns:
            has, close = one_of(map(str, table.columns)), nearest(name, map(str, table.columns))
            raise UserError(f"{path}: no column {name!r}; it has: {has}{close}")
    x = np.stack([_numbers(path, table[name]) for name in columns], axis=1)
    y = _numbers(path, table[target]) if classes is None else _codes(path, table[target], classes)
    if regression:
        return TensorDataset(_inputs(x), torch.from_numpy(y.astype(np.float32))[:, None])
    if (y != np.round(y)).any():
        raise UserError(
            f"{path}: column {target!r} holds {y[y != np.round(y)][0]}, no class number"
        )
    return TensorDataset(_inputs(x), torch.from_numpy(y.astype(np.int64)))


def _numbers(path: str, column: pd.Series) -> np.ndarray:
    numbers = pd.to_numeric(column, errors="coerce").to_numpy(np.float64)
    wrong = np.flatnonzero(~np.isfinite(numbers))
    if len(wrong):
        cell = column.iloc[wrong[0]]
        line = int(wrong[0]) + 2
        raise UserError(f"{path}: line {line}, column {column.name!r}: {cell} is no finite number")
    return numbers


def _codes(path: str, column: pd.Series, classes: list[str]) -> np.ndarray:
    codes = {name: float(code) for code, name in enumerate(classes)}
    texts = column.astype(str)
    unknown = texts[~texts.isin(classes)]
    if len(unknown):
        raise UserError(f"{path}: class {unknown.iloc[0]!r} is not among {one_of(classes)}")
    return texts.map(codes).to_numpy(np.float64)
