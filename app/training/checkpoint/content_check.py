"""What a checkpoint of this program has inside, looked at before any of it is used."""

from __future__ import annotations

from pathlib import Path
from types import NoneType
from typing import Any

from torch import Tensor

from app.config.limits import load_json
from app.runtime.errors import UserError

Kinds = tuple[type, ...]
CONTENT: dict[str, Kinds] = {
    "config": (str,),
    "template": (str, NoneType),
    "model": (dict,),
    "task": (dict,),
    "epoch": (int,),
    "history": (str,),
    "training": (dict, NoneType),
}
TRAINING: dict[str, Kinds] = {
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
UNDER_WAY: dict[str, Kinds] = {"batches": (int,), "rows": (dict,), "ranks": (list,)}
SAVED = (str, int, float, bool, NoneType)
CELLS = (int, float, str)  # of a row of the history


def check_content(file: Path, content: Any) -> None:
    """Every part of a checkpoint is there, and is what it should be.

    Args:
        file: It is from, for errors.
        content: As `load_plain` gives it, of a format that this program reads.

    Raises:
        UserError: The first part that is missing, or something else.
    """
    wrong = _wrong(content)
    if wrong is not None:
        raise UserError(f"{file} is no checkpoint of this program: {wrong}")
    config = load_json(content["config"], f"{file}: config")
    if not isinstance(config, (dict, NoneType)):
        raise UserError(f"{file} is no checkpoint of this program: config is no configuration")
    if config is not None and content["template"] is None:
        raise UserError(f"{file} is no checkpoint of this program: config has no template")
    history = load_json(content["history"], f"{file}: history")
    if not isinstance(history, list) or not all(_is_row(row) for row in history):
        raise UserError(f"{file} is no checkpoint of this program: history is no list of rows")


def check_savable(key: str, value: Any) -> None:
    """What is to be saved can be read again: a checkpoint holds nothing that could be called.

    Args:
        key: Where the value is, for errors.
        value: Tensors and plain values, in lists, tuples and dicts.

    Raises:
        UserError: Something else is among it.
    """
    if isinstance(value, dict):
        for name, part in value.items():
            if type(name) not in (str, int):
                raise UserError(f"{key}: the name {name!r} cannot be saved; allowed: str, int")
            check_savable(f"{key}.{name}", part)
    elif isinstance(value, (list, tuple)):
        for place, part in enumerate(value):
            check_savable(f"{key}.{place}", part)
    elif not isinstance(value, Tensor) and type(value) not in SAVED:
        raise UserError(
            f"{key}: a {type(value).__name__} cannot be saved; allowed: tensors, numbers, texts, "
            "None, and lists, tuples and dicts of them"
        )


def _wrong(content: Any) -> str | None:
    if not isinstance(content, dict):
        return f"it is a {type(content).__name__}"
    wrong = _unlike(content, CONTENT, "")
    if wrong is not None:
        return wrong
    if not all(type(n) is str and isinstance(t, Tensor) for n, t in content["model"].items()):
        return "model has more than named tensors"
    training = content["training"]
    if training is None or "is_over" not in training:
        return None  # weights alone
    wrong = _unlike(training, TRAINING, "training.")
    if wrong is not None or training["under_way"] is None:
        return wrong
    return _unlike(training["under_way"], UNDER_WAY, "training.under_way.")


def _unlike(part: dict[Any, Any], kinds: dict[str, Kinds], key: str) -> str | None:
    for name, allowed in kinds.items():
        if name not in part:
            return f"it has no {key}{name}"
        value = part[name]
        if type(value) not in allowed:
            wanted = " or ".join(kind.__name__ for kind in allowed)
            return f"{key}{name} is of type {type(value).__name__}, not {wanted}"
        if type(value) is int and value < 0:
            return f"{key}{name}={value} is below 0"
    return None


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("epoch"), int)
        and isinstance(row.get("stage"), str)
        and all(isinstance(cell, CELLS) for cell in row.values())
    )
