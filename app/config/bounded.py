"""YAML and JSON from others, read with bounds: what is short to write must be small to hold."""

from __future__ import annotations

import json
from types import NoneType
from typing import Any

import yaml
from omegaconf._utils import get_yaml_loader

from app.runtime.errors import UserError

DEPTH = 64  # of lists and dicts in one another
LENGTH = 2_000_000  # letters of a YAML text
LONGEST = 50_000  # letters of one of its values or keys
BITS = 64  # of an integer
KINDS = (str, int, float, bool, NoneType, list, dict)
VALUES = 100_000  # in a YAML text


def load_yaml(text: object, source: str, most: int = VALUES) -> Any:
    """The plain value of a YAML text, read as OmegaConf reads it.

    Args:
        text: What should be one.
        source: The file or key that it is from, for errors.
        most: Values in it, those of an alias counted each time that it is used.

    Raises:
        UserError: It is none, or far larger or deeper than any configuration.
    """
    if not isinstance(text, str):
        raise UserError(f"{source} is a {type(text).__name__}, not a YAML text")
    if len(text) > LENGTH:
        raise UserError(f"{source} has {len(text):,} letters; allowed: {LENGTH:,}")
    try:
        _check_events(text, most)
        return _plain(yaml.load(text, get_yaml_loader()))
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    # What is no date, or no number that Python takes, is a ValueError.
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{source} is not YAML: {reason[:200]}") from error


def _check_events(text: str, most: int) -> None:
    """Counts what the text will become, before it becomes that."""
    sizes: list[int] = [0]  # of what is open, from the outermost in
    names: list[str | None] = []  # their anchors
    anchored: dict[str, int] = {}
    for event in yaml.parse(text, yaml.SafeLoader):
        size = 0
        if isinstance(event, yaml.CollectionStartEvent):
            sizes.append(1)
            names.append(event.anchor)
        elif isinstance(event, yaml.CollectionEndEvent):
            size, name = sizes.pop(), names.pop()
            if name:
                anchored[name] = size
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
            if event.anchor:
                anchored[event.anchor] = size
            if len(event.value) > LONGEST:
                raise UserError(f"a text of {len(event.value):,} letters; allowed: {LONGEST:,}")
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in anchored or event.anchor in names:
                raise UserError("an alias that stands for nothing finished")
            size = anchored[event.anchor]
        sizes[-1] += size
        if len(sizes) > DEPTH:
            raise UserError(f"values nested more than {DEPTH} deep")
        if sum(sizes) > most:
            raise UserError(f"more than {most:,} values")


def load_json(text: object, source: str) -> Any:
    """The plain value of a JSON text.

    Args:
        text: What should be one.
        source: The file or key that it is from, for errors.

    Raises:
        UserError: It is none, or far deeper than any configuration or table.
    """
    if not isinstance(text, str):
        raise UserError(f"{source} is a {type(text).__name__}, not a JSON text")
    try:
        return _plain(json.loads(text))
    except RecursionError as error:
        raise UserError(f"{source}: values nested more than {DEPTH} deep") from error
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    except ValueError as error:
        raise UserError(f"{source} is not JSON: {error}") from error


def _plain(value: Any) -> Any:
    """The same, if it is what JSON has, and no deeper than others can follow."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEPTH:
            raise UserError(f"values nested more than {DEPTH} deep")
        for one in level:
            if type(one) not in KINDS:
                raise UserError(f"a value of type {type(one).__name__}")
            if type(one) is int and one.bit_length() > BITS:
                raise UserError(f"an integer of more than {BITS} bits")
        level = [part for outer in level for part in _parts(outer)]
    return value


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, list) else []
