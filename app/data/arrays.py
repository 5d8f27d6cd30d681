"""Arrays (`.npz`) and tables (`.csv`) of the user, read into memory."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from app.config.schema import AUTO
from app.data.archives import check_name, open_table, read_npz
from app.runtime.errors import UserError, join_choices


def npz(path: str, inputs: str, targets: str, channels_last: bool = False) -> TensorDataset:
    """Load two arrays of a NumPy file.

    Args:
        path: The `.npz` file; nothing in it is unpickled.
        inputs: Name of the array of N samples. (N, H, W) becomes (N, 1, H, W).
        targets: Name of the array of N labels (integers) or values (floats).
        channels_last: Whether samples have shape (H, W, C).

    Raises:
        UserError: The file or an array is missing, damaged, or of the wrong kind.
    """
    x, y = read_npz(Path(path), (inputs, targets))
    if len(x) != len(y):
        raise UserError(f"{path}: {inputs!r} has {len(x)} samples, but {targets!r} has {len(y)}")
    x = np.moveaxis(x, -1, 1) if channels_last else x
    x = x[:, None] if x.ndim == 3 else x
    return TensorDataset(_to_inputs(x), _to_targets(y))


def _to_inputs(x: np.ndarray) -> Tensor:
    if x.dtype.kind not in "uif":
        raise UserError(f"samples have the non-numeric dtype {x.dtype}")
    x = np.ascontiguousarray(x)
    return torch.from_numpy(x) if x.dtype == np.uint8 else torch.from_numpy(x.astype(np.float32))


def _to_targets(y: np.ndarray) -> Tensor:
    if y.dtype.kind in "ui":
        return torch.from_numpy(y.astype(np.int64))
    if y.dtype.kind == "f":
        return torch.from_numpy(y.astype(np.float32))
    raise UserError(f"labels have the non-numeric dtype {y.dtype}")


class NamedClasses(TensorDataset):
    """Tensors of N samples whose classes have names.

    Attributes:
        classes: Names in the order of the labels; None if they are not known.
    """

    def __init__(
        self, *tensors: Tensor, classes: list[str] | None, groups: list[str] | None = None
    ) -> None:
        super().__init__(*tensors)
        self.classes, self.groups = classes, groups


def csv(
    path: str,
    target: str,
    features: list[str] | None = None,
    classes: list[str] | Literal["auto"] | None = AUTO,
    regression: bool = False,
    group: str | None = None,
) -> NamedClasses:
    """Load a table with a header line.

    Args:
        path: The `.csv` file, which may be compressed (`.csv.gz`, `.bz2`, `.xz`, `.zip`).
        target: Name of the target column.
        features: Names of the feature columns; None uses all other columns.
        classes: Class names in the target column, in the order of their indices; None if the
            column contains the indices 0, 1, ... already; `auto` finds out, and takes the names in
            alphabetical order.
        regression: Whether the target is a value instead of a class label.
        group: Name of a column whose equal values stay in one part when the data are split.

    Returns:
        Features, float32 of shape (N, columns), and int64 labels of shape (N,) or, for a
        regression, float32 values of shape (N, 1).

    Raises:
        UserError: The file or a column is missing, or a cell is empty or not a number.
    """
    if not Path(path).is_file():
        raise UserError(f"{path!r} is not a file")
    try:
        with open_table(Path(path)) as file:
            table = pd.read_csv(file)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a table: {error}") from error
    columns = features or [str(name) for name in table.columns if name not in (target, group)]
    for name in [target, *columns, *([] if group is None else [group])]:
        check_name(path, "column", name, [str(column) for column in table.columns])
    x = np.stack([_to_numbers(path, table[name]) for name in columns], axis=1)
    groups = None if group is None else table[group].astype(str).tolist()
    is_text = not regression and not pd.api.types.is_numeric_dtype(table[target])
    names = classes
    if names == AUTO:
        names = sorted(table[target].dropna().astype(str).unique()) if is_text else None
    y = (
        _to_numbers(path, table[target])
        if names is None
        else _to_class_indices(path, table[target], names)
    )
    if regression:
        values = torch.from_numpy(y.astype(np.float32))[:, None]
        return NamedClasses(_to_inputs(x), values, classes=None, groups=groups)
    if (y != np.round(y)).any():
        value = y[y != np.round(y)][0]
        raise UserError(f"{path}: column {target!r} contains {value}, which is not a class index")
    return NamedClasses(
        _to_inputs(x), torch.from_numpy(y.astype(np.int64)), classes=names, groups=groups
    )


def _to_numbers(path: str, column: pd.Series) -> np.ndarray:
    numbers = pd.to_numeric(column, errors="coerce").to_numpy(np.float64)
    invalid = np.flatnonzero(~np.isfinite(numbers))
    if len(invalid):
        cell = column.iloc[invalid[0]]
        line = int(invalid[0]) + 2  # counted from 1, after the header
        raise UserError(
            f"{path}: line {line}, column {column.name!r}: {cell} is not a finite number"
        )
    return numbers


def _to_class_indices(path: str, column: pd.Series, classes: list[str]) -> np.ndarray:
    index_of = {name: float(index) for index, name in enumerate(classes)}
    names = column.astype(str)
    unknown = names[~names.isin(classes)]
    if len(unknown):
        raise UserError(
            f"{path}: unknown class {unknown.iloc[0]!r}; allowed: {join_choices(classes)}"
        )
    return names.map(index_of).to_numpy(np.float64)
