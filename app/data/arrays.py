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
    _check_features(path, table[columns])
    x = np.stack([_to_numbers(path, table[name]) for name in columns], axis=1)
    groups = None
    if group is not None:
        _check_not_empty(path, table[group])
        groups = table[group].astype(str).tolist()
    if regression:
        values = torch.from_numpy(_to_numbers(path, table[target]).astype(np.float32))[:, None]
        return NamedClasses(_to_inputs(x), values, classes=None, groups=groups)
    labels, names = _to_labels(path, table[target], classes)
    return NamedClasses(_to_inputs(x), torch.from_numpy(labels), classes=names, groups=groups)


def _check_features(path: str, table: pd.DataFrame) -> None:
    """Refuse columns of text; `_to_numbers` reports a single cell that is not a number."""
    text = [str(name) for name in table.columns if _is_text(table[name])]
    if not text:
        return
    numeric = ",".join(str(name) for name in table.columns if name not in text)
    leave_out = f", or leave them out: data.source.train.features=[{numeric}]" if numeric else ""
    raise UserError(
        f"{path}: columns with text instead of numbers: {', '.join(text)}; encode them first, for "
        f"example with pandas.get_dummies{leave_out}"
    )


def _is_text(column: pd.Series) -> bool:
    has_numbers = pd.to_numeric(column, errors="coerce").notna().any()
    return len(column) > 0 and not pd.api.types.is_numeric_dtype(column) and not has_numbers


def _to_labels(
    path: str, column: pd.Series, classes: list[str] | Literal["auto"] | None
) -> tuple[np.ndarray, list[str] | None]:
    """Return class indices (int64) and the names of the classes."""
    _check_not_empty(path, column)
    if classes == AUTO:
        is_text = not pd.api.types.is_numeric_dtype(column)
        classes = sorted(column.astype(str).unique()) if is_text else None
    if classes is not None:
        return _to_class_indices(path, column, classes), classes
    if _is_text(column):
        raise UserError(
            f"{path}: column {column.name!r} contains names, such as {column.iloc[0]!r}; set "
            "data.class_names=auto, or a list in the order of the labels"
        )
    labels = _to_numbers(path, column)
    fractions = labels[labels != np.round(labels)]
    if len(fractions):
        raise UserError(
            f"{path}: column {column.name!r} contains {fractions[0]}, which is not a class index; "
            "to predict values, use experiment=csv_regression"
        )
    return labels.astype(np.int64), None


def _to_numbers(path: str, column: pd.Series) -> np.ndarray:
    _check_not_empty(path, column)
    numbers = pd.to_numeric(column, errors="coerce").to_numpy(np.float64)
    invalid = np.flatnonzero(~np.isfinite(numbers))
    if len(invalid):
        cell = column.iloc[invalid[0]]
        raise UserError(f"{_place(path, column, invalid[0])}: {cell} is not a finite number")
    return numbers


def _check_not_empty(path: str, column: pd.Series) -> None:
    empty = np.flatnonzero(column.isna())
    if len(empty):
        raise UserError(
            f"{_place(path, column, empty[0])} is empty, one of {len(empty)} such cells (NA, nan, "
            "null and None count as empty); fill them, or remove their lines"
        )


def _place(path: str, column: pd.Series, row: int) -> str:
    line = int(row) + 2  # counted from 1, after the header
    return f"{path}: line {line}, column {column.name!r}"


def _to_class_indices(path: str, column: pd.Series, classes: list[str]) -> np.ndarray:
    indices = {name: index for index, name in enumerate(classes)}
    names = column.astype(str)
    unknown = np.flatnonzero(~names.isin(classes))
    if len(unknown):
        name = names.iloc[unknown[0]]
        raise UserError(
            f"{_place(path, column, unknown[0])}: unknown class {name!r}; data.class_names allows: "
            f"{join_choices(classes)}"
        )
    return names.map(indices).to_numpy(np.int64, copy=True)
