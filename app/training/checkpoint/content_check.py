"""Check the content of a checkpoint before any of it is used."""

from __future__ import annotations

from pathlib import Path
from types import NoneType
from typing import Any

from torch import Tensor

from app.config.limits import load_json
from app.runtime.errors import UserError

Types = tuple[type, ...]
CONTENT: dict[str, Types] = {
    "config": (str,),
    "template": (str, NoneType),
    "model": (dict,),
    "task": (dict,),
    "epoch": (int,),
    "history": (str,),
    "training": (dict, NoneType),
}
TRAINING: dict[str, Types] = {
    "learning": (dict,),
    "averaging": (dict,),
    "batches": (int,),
    "trained": (int,),
    "is_over": (bool,),
    "time_is_up": (bool,),
    "under_way": (dict, NoneType),
    "watchers": (dict,),
    "saves": (int,),
    "nonfinite": (dict,),
}
MID_EPOCH: dict[str, Types] = {"batches": (int,), "rows": (dict,), "ranks": (list,)}
SAVABLE = (str, int, float, bool, NoneType)
CELL_TYPES = (int, float, str)  # in a row of the history


def check_content(file: Path, content: Any) -> None:
    """Check that a checkpoint has all its entries, each of the right type.

    Args:
        file: Where it comes from, for error messages.
        content: Result of `load_plain`, of the format version that this program reads.

    Raises:
        UserError: An entry is missing or of the wrong type; the message names the first one.
    """
    problem = _find_problem(content)
    if problem is not None:
        raise UserError(f"{file} is not a checkpoint of this program: {problem}")
    config = load_json(content["config"], f"{file}: config")
    if not isinstance(config, (dict, NoneType)):
        raise UserError(
            f"{file} is not a checkpoint of this program: config is not a configuration"
        )
    if config is not None and content["template"] is None:
        raise UserError(f"{file} is not a checkpoint of this program: config has no template")
    history = load_json(content["history"], f"{file}: history")
    if not isinstance(history, list) or not all(_is_row(row) for row in history):
        raise UserError(
            f"{file} is not a checkpoint of this program: history is not a list of rows"
        )


def check_savable(key: str, value: Any) -> None:
    """Check that `load_plain` will be able to read a value, before it is saved.

    Args:
        key: Where the value is, for error messages.
        value: Tensors and plain values, in lists, tuples and dicts.

    Raises:
        UserError: It contains an object of another type.
    """
    if isinstance(value, dict):
        for name, part in value.items():
            if type(name) not in (str, int):
                raise UserError(f"{key}: the key {name!r} cannot be saved; allowed: str, int")
            check_savable(f"{key}.{name}", part)
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            check_savable(f"{key}.{index}", part)
    elif not isinstance(value, Tensor) and type(value) not in SAVABLE:
        raise UserError(
            f"{key}: a {type(value).__name__} cannot be saved; allowed: tensors, numbers, strings, "
            "None, and lists, tuples and dicts of them"
        )


def _find_problem(content: Any) -> str | None:
    if not isinstance(content, dict):
        return f"it is a {type(content).__name__}"
    problem = _find_entry_problem(content, CONTENT, "")
    if problem is not None:
        return problem
    if not all(type(n) is str and isinstance(t, Tensor) for n, t in content["model"].items()):
        return "model contains more than named tensors"
    training = content["training"]
    if training is None or "is_over" not in training:
        return None  # weights only
    problem = _find_entry_problem(training, TRAINING, "training.")
    if problem is not None or training["under_way"] is None:
        return problem
    return _find_entry_problem(training["under_way"], MID_EPOCH, "training.under_way.")


def _find_entry_problem(part: dict[Any, Any], types: dict[str, Types], prefix: str) -> str | None:
    for name, allowed in types.items():
        if name not in part:
            return f"it has no {prefix}{name}"
        value = part[name]
        if type(value) not in allowed:
            expected = " or ".join(kind.__name__ for kind in allowed)
            return f"{prefix}{name} is of type {type(value).__name__}, not {expected}"
        if type(value) is int and value < 0:
            return f"{prefix}{name}={value} is below 0"
    return None


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("epoch"), int)
        and isinstance(row.get("stage"), str)
        and all(isinstance(cell, CELL_TYPES) for cell in row.values())
    )
